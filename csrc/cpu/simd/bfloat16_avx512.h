#pragma once
// 16 bf16 values as float32 and back: nearest even, a NaN stays one, denormals stay (the bf16
// instructions flush them). Include inside the target region.

namespace pysparse {
namespace {

inline __m512 widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// In the low half of each lane: as assign(BFloat16&, float).
inline __m512i bf16_bits(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                               _mm512_set1_epi32(0x7fc0));
}

inline __m256i narrow_bf16(__m512 v) { return _mm512_cvtepi32_epi16(bf16_bits(v)); }

inline __m512 round_bf16(__m512 v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(bf16_bits(v), 16));
}

}  // namespace
}  // namespace pysparse
