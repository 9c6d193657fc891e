#pragma once
// Expands 8 packed values to the lanes that an 8-bit mask names: AVX2 has no such instruction, so a
// table of 256 shuffles stands in. Include inside an AVX2 target region's file, before the region
// opens.
#include <immintrin.h>

#include <array>
#include <cstdint>

namespace pysparse {
namespace {

struct ExpandTables {
  alignas(64) uint8_t words[256][16] = {};  // byte shuffle for 16-bit values; 0x80 writes zero
  alignas(64) uint32_t lanes[256][8] = {};  // lane permutation for 32-bit values

  constexpr ExpandTables() {
    for (int mask = 0; mask < 256; ++mask) {
      int source = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = mask >> lane & 1;
        words[mask][2 * lane] = static_cast<uint8_t>(kept ? 2 * source : 0x80);
        words[mask][2 * lane + 1] = static_cast<uint8_t>(kept ? 2 * source + 1 : 0x80);
        lanes[mask][lane] = static_cast<uint32_t>(kept ? source : 0);
        source += kept;
      }
    }
  }
};

constexpr ExpandTables kExpandTables;

}  // namespace
}  // namespace pysparse
