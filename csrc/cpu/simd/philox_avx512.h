#pragma once
// Sixteen Philox blocks at once. Include inside a target region, after pysparse/shapley_draw.h.

namespace pysparse {
namespace {

// High and low words of sixteen 32 x 32 -> 64 bit products.
inline void multiply_wide(__m512i a, __m512i b, __m512i& high, __m512i& low) {
  const __m512i even = _mm512_mul_epu32(a, b);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

inline __m512i xor3(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}

// Words [4 * block, 4 * block + 64) of the stream, in its order: lane 4q + r works on block 4r + q,
// so that the unpacking below is the transposition.
inline void philox_group(const Stream& stream, uint32_t block, __m512i out[4]) {
  const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i m0 = _mm512_set1_epi32(static_cast<int>(kPhiloxMultiplier[0]));
  const __m512i m1 = _mm512_set1_epi32(static_cast<int>(kPhiloxMultiplier[1]));
  __m512i x0 = _mm512_set1_epi32(static_cast<int>(stream.low()));
  __m512i x1 = _mm512_set1_epi32(static_cast<int>(stream.high()));
  __m512i x2 = _mm512_set1_epi32(static_cast<int>(stream.purpose));
  __m512i x3 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(block)), lanes);
  uint32_t k0 = static_cast<uint32_t>(stream.key), k1 = static_cast<uint32_t>(stream.key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    __m512i high0, low0, high1, low1;
    multiply_wide(x0, m0, high0, low0);
    multiply_wide(x2, m1, high1, low1);
    x0 = xor3(high1, x1, _mm512_set1_epi32(static_cast<int>(k0)));
    x2 = xor3(high0, x3, _mm512_set1_epi32(static_cast<int>(k1)));
    x1 = low1;
    x3 = low0;
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
  const __m512i a = _mm512_unpacklo_epi32(x0, x1), b = _mm512_unpackhi_epi32(x0, x1);
  const __m512i c = _mm512_unpacklo_epi32(x2, x3), d = _mm512_unpackhi_epi32(x2, x3);
  out[0] = _mm512_unpacklo_epi64(a, c);
  out[1] = _mm512_unpackhi_epi64(a, c);
  out[2] = _mm512_unpacklo_epi64(b, d);
  out[3] = _mm512_unpackhi_epi64(b, d);
}

// Rejections are so rare that a test which lets too many through (low word below the range, and not
// below 2^32 mod range) costs less than the division.
inline void redraw_rejected(const Stream& stream, __m512i low, __m512i range, uint32_t step,
                            uint32_t players, uint32_t* partner) {
  alignas(64) uint32_t lows[16];
  _mm512_store_si512(lows, low);
  for (unsigned bad = _mm512_cmplt_epu32_mask(low, range); bad; bad &= bad - 1) {
    const int lane = __builtin_ctz(bad);
    const uint32_t i = step + static_cast<uint32_t>(lane), span = players - i;
    if (i < players && lows[lane] < (0u - span) % span)
      partner[i] = i + draw_again(stream, i, span);
  }
}

inline void draw_partners(const Stream& stream, int64_t players, uint32_t* partner) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i all = _mm512_set1_epi32(static_cast<int>(players)), one = _mm512_set1_epi32(1);
  for (int64_t i = 0; i < players; i += ShapleyDraw::kGroup) {
    __m512i words[4];
    philox_group(stream, static_cast<uint32_t>(i / 4), words);
    for (int r = 0; r < 4; ++r) {
      const auto step = static_cast<uint32_t>(i + 16 * r);
      const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(step)), lane);
      const __m512i range = _mm512_max_epi32(_mm512_sub_epi32(all, at), one);
      __m512i high, low;
      multiply_wide(words[r], range, high, low);
      _mm512_storeu_si512(partner + step, _mm512_add_epi32(at, high));
      if (_mm512_cmplt_epu32_mask(low, range))
        redraw_rejected(stream, low, range, step, static_cast<uint32_t>(players), partner);
    }
  }
}

}  // namespace
}  // namespace pysparse
