#pragma once
// The end of an fp32 tile whose registers hold 8 rows x 2 columns. Include inside the target
// region.

namespace pysparse {
namespace {

// Lanes (r, even), (r, odd) of rows 0-7 in `low` and 8-15 in `high` become 16 row sums.
inline __m512 add_columns(__m512 low, __m512 high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return _mm512_add_ps(_mm512_permutex2var_ps(low, even, high),
                       _mm512_permutex2var_ps(low, odd, high));
}

}  // namespace
}  // namespace pysparse
