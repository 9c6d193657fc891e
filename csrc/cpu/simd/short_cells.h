#pragma once
// Cells that keep half their weights or less. Packed values start anywhere, so a load of a whole
// register nearly always touches two cache lines, one of half a register every other time: from
// 70 % zeros on, that is 9 to 15 % of a cold weight's time at one token (Zen 4). The choice between
// the two is a branch, so it pays only where it can be foretold.
// Include inside the target region, for its popcount.

namespace pysparse {
namespace {

constexpr int64_t kSampledCells = 64;
constexpr int64_t kLongCellsAllowed = 2;  // of the sample; each costs some 20 cycles when taken

// Judges a tile by its first cells. Either way the sums are the same.
template <class Mask>
[[maybe_unused]] bool mostly_short(const Mask* masks, int64_t count) {
  constexpr int kHalf = sizeof(Mask) * 4;
  int64_t longer = 0;
  for (int64_t i = 0; i < kSampledCells && i < count; ++i)
    longer += __builtin_popcountll(masks[i]) > kHalf;
  return longer <= kLongCellsAllowed;
}

}  // namespace
}  // namespace pysparse
