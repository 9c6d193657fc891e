#pragma once
// The end of a group of columns: whole sums become scaled floats. Include inside the target region.

namespace pysparse {
namespace {

// Two sums of each of four rows in each of four vectors.
inline void flush_pairs(const __m256i (&sums)[4], const RowScales& scales, int64_t group,
                        int64_t tile, float* rows) {
  alignas(32) int32_t lanes[8];
  for (int b = 0; b < 4; ++b) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), sums[b]);
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * b + i;
      const int whole =
          lanes[2 * i] + lanes[2 * i + 1] - kInputZero * scales.sums_of(group, tile)[r];
      rows[r] += scales.scale_of(group, tile)[r] * static_cast<float>(whole);
    }
  }
}

}  // namespace
}  // namespace pysparse
