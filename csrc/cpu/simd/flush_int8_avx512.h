#pragma once
// The end of a group of columns: whole sums become scaled floats. Include inside the target region.

namespace pysparse {
namespace {

template <int kChains, int kVectors>
inline void flush_group(__m512i (&sums)[kChains][kVectors], const RowScales& scales, int64_t group,
                        int64_t tile, float (&rows)[kVectors][kTileRows]) {
  const __m512 scale = _mm512_loadu_ps(scales.scale_of(group, tile));
  const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(scales.sums_of(group, tile)), 7);
#pragma GCC unroll 16
  for (int v = 0; v < kVectors; ++v) {
    __m512i sum = sums[0][v];
#pragma GCC unroll 8
    for (int c = 1; c < kChains; ++c) sum = _mm512_add_epi32(sum, sums[c][v]);
    const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, offset));
    _mm512_store_ps(rows[v], _mm512_fmadd_ps(scale, whole, _mm512_load_ps(rows[v])));
  }
}

}  // namespace
}  // namespace pysparse
