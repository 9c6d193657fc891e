#pragma once
// The index fields of a step of an n:m weight as lanes: each weight's place in its block. Include
// simd/nm_pattern.h first, then this inside the target region.

namespace pysparse {
namespace {

template <class P>
[[maybe_unused]] inline __m512i decode_words(const uint8_t* indices) {  // 16 rows x 2
  static constexpr IndexSpread<P, uint16_t, 32, 0> spread;
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(indices)));
  const __m512i words = _mm512_shuffle_epi8(bytes, _mm512_load_si512(spread.shuffle));
  const __m512i shifted = _mm512_srlv_epi16(words, _mm512_load_si512(spread.shift));
  return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi16(P::kMask),
                                   _mm512_load_si512(spread.start), 0xea);  // (a & b) | c
}

template <class P, int kHalf>
[[maybe_unused]] inline __m512i decode_dwords(const uint8_t* indices) {  // 8 rows x 2
  static constexpr IndexSpread<P, uint32_t, 16, 16 * kHalf> spread;
  const __m512i bytes =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(indices)));
  const __m512i lanes = _mm512_shuffle_epi8(bytes, _mm512_load_si512(spread.shuffle));
  const __m512i shifted = _mm512_srlv_epi32(lanes, _mm512_load_si512(spread.shift));
  return _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(P::kMask),
                                   _mm512_load_si512(spread.start), 0xea);  // (a & b) | c
}

}  // namespace
}  // namespace pysparse
