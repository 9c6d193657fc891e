#pragma once
// The n:m patterns that vector kernels are written for, as constants; and the choice among them and
// the number of tokens.
#include <array>

#include "pysparse/nm.h"

namespace pysparse {
namespace {

template <int kN, int kM, int kPerRow>
struct Pattern {
  static constexpr NmLayout kLayout{kN, kM, kPerRow, 0, 0};
  static constexpr int kBits = kLayout.bits(), kSteps = kLayout.block_steps();
  static constexpr int kCols = kLayout.block_cols(), kStepValues = kLayout.step_values();
  static constexpr int kStepBytes = kLayout.step_bytes(), kMask = (1 << kBits) - 1;

  // The first column, within the block, of the group that value `lane` of a row belongs to. (Every
  // step of a block alike: true of the patterns below.)
  static constexpr int group_start(int lane) { return lane % kPerRow / kN * kM; }
};

// Work<Pattern>::run for the pattern of the layout.
template <template <class> class Work, int kPerRow, class... Arguments>
void with_pattern(const NmLayout& layout, const Arguments&... arguments) {
  if (layout.m == 4) {
    if (layout.n == 1) return Work<Pattern<1, 4, kPerRow>>::run(arguments...);
    return Work<Pattern<2, 4, kPerRow>>::run(arguments...);
  }
  if (layout.m == 16) return Work<Pattern<2, 16, kPerRow>>::run(arguments...);
  if (layout.n == 1) return Work<Pattern<1, 8, kPerRow>>::run(arguments...);
  if (layout.n == 2) return Work<Pattern<2, 8, kPerRow>>::run(arguments...);
  return Work<Pattern<4, 8, kPerRow>>::run(arguments...);
}

// How index fields spread over the lanes of a register, by a byte shuffle of 16 broadcast bytes, a
// shift per lane, and the start of each lane's group. `Lane` is the integer type of a lane.
template <class P, class Lane, int kLanes, int kFirst>
struct IndexSpread {
  alignas(64) uint8_t shuffle[64] = {};
  alignas(64) Lane shift[kLanes] = {}, start[kLanes] = {};

  constexpr IndexSpread() {
    for (int i = 0; i < kLanes; ++i) {
      const int bit = (kFirst + i) * P::kBits, bytes = static_cast<int>(sizeof(Lane));
      for (int b = 0; b < bytes; ++b)
        shuffle[bytes * i + b] =
            static_cast<uint8_t>(b < 2 && bit / 8 + b < 16 ? bit / 8 + b : 0x80);
      shift[i] = static_cast<Lane>(bit % 8);
      start[i] = static_cast<Lane>(P::group_start(i));
    }
  }
};

}  // namespace
}  // namespace pysparse
