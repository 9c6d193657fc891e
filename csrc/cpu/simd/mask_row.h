#pragma once
// Bits of a row-major bitmap.
#include <cstdint>
#include <cstring>

#include "pysparse/views.h"

namespace pysparse {
namespace {

struct MaskRow {
  const uint8_t* bytes;
  int64_t count;  // of bytes

  MaskRow(const BitmapView& mask, int64_t row)
      : bytes(mask.bitmask + row * mask_bytes(mask.cols)), count(mask_bytes(mask.cols)) {}

  bool kept(int64_t col) const { return bytes[col / 8] >> (col % 8) & 1; }

  // Bits of columns [col, col + 16), zero past the end of the row; `col` is a multiple of 8.
  uint32_t sixteen(int64_t col) const {
    const int64_t at = col / 8;
    return bytes[at] | (at + 1 < count ? uint32_t{bytes[at + 1]} << 8 : 0u);
  }

  // How many weights are kept before `col`, a multiple of 8.
  int64_t kept_before(int64_t col) const {
    int64_t total = 0, at = 0;
    for (; at + 8 <= col / 8; at += 8) {
      uint64_t word;
      std::memcpy(&word, bytes + at, sizeof word);
      total += __builtin_popcountll(word);
    }
    for (; at < col / 8; ++at) total += __builtin_popcount(bytes[at]);
    return total;
  }
};

}  // namespace
}  // namespace pysparse
