#pragma once
// The walk over a block of rows, written once for every vector width: four rows of a group keep
// their sums in registers while their pairs stream by. `P` is the pair policy of the including
// file:
//   P::Entry (one pair of weights in memory), P::Input (an activation), P::Sum, P::kLanes,
//   P::kRows (rows of a group at a time: 2 or 4), zero(), load(p), store(p, sum),
//   add<kVectors>(entry, x0, x1, sums): multiplies both inputs' kVectors * kLanes tokens.
// Include inside the target region: everything here is a template in an unnamed namespace.

namespace pysparse {
namespace {

// Without it a cold weight takes a fifth longer at 16 tokens, where a pair costs the fewest cycles.
constexpr int64_t kPairPrefetchBytes = 2048;

template <class P, int kVectors>
inline void pairs_group(const typename P::Entry* entry, const uint8_t* index, int count,
                        const typename P::Input* input, const uint8_t* rows, bool first,
                        float* sums) {
  constexpr int kWidth = kVectors * P::kLanes;
  typename P::Sum held[P::kRows][kVectors];
#pragma GCC unroll 4
  for (int u = 0; u < P::kRows; ++u)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      held[u][v] = first ? P::zero() : P::load(sums + rows[u] * kWidth + v * P::kLanes);
  for (; count > 0; --count, entry += kPairGroup, index += 2 * kPairGroup) {
    _mm_prefetch(reinterpret_cast<const char*>(entry) + kPairPrefetchBytes, _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(index) + kPairPrefetchBytes / 2, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int u = 0; u < P::kRows; ++u)
      P::template add<kVectors>(entry[u], input + size_t{index[2 * u]} * kWidth,
                                input + size_t{index[2 * u + 1]} * kWidth, held[u]);
  }
#pragma GCC unroll 4
  for (int u = 0; u < P::kRows; ++u)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      P::store(sums + rows[u] * kWidth + v * P::kLanes, held[u][v]);
}

// sums[row][token] of a block of rows, over all columns.
template <class P, int kVectors>
void pairs_block(const PairsView& weight, int64_t row_block, const typename P::Input* input,
                 float* sums) {
  constexpr int kWidth = kVectors * P::kLanes;
  const int64_t slots = weight.slots(row_block);
  for (int64_t cb = 0; cb < weight.col_blocks(); ++cb, input += weight.block_cols() * kWidth) {
    const int64_t start = weight.block_offsets[row_block * weight.col_blocks() + cb];
    const auto* entry = static_cast<const typename P::Entry*>(weight.values) + start;
    const uint8_t* index = weight.indices + 2 * start;
    const uint8_t* rows = weight.row_order + weight.first_slot(row_block, cb);
    const uint8_t* counts = weight.counts + weight.first_slot(row_block, cb) / kPairGroup;
    for (int64_t slot = 0; slot < slots; slot += kPairGroup, rows += kPairGroup) {
      const int count = *counts++;
      // The next group's sums lie anywhere in the block: asked for now, they come in time.
      for (int u = 0; u < kPairGroup; ++u)
        for (int line = 0; line < kWidth; line += 16)
          _mm_prefetch(reinterpret_cast<const char*>(sums + rows[kPairGroup + u] * kWidth + line),
                       _MM_HINT_T0);
#pragma GCC unroll 2
      for (int u = 0; u < kPairGroup; u += P::kRows)
        pairs_group<P, kVectors>(entry + u, index + 2 * u, count, input, rows + u, cb == 0, sums);
      entry += count * kPairGroup;
      index += 2 * count * kPairGroup;
    }
  }
  if (weight.col_blocks() == 0)
    for (int64_t i = 0; i < slots * kWidth; ++i) sums[i] = 0.0f;
}

}  // namespace
}  // namespace pysparse
