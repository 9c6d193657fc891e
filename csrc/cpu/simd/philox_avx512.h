#pragma once
// Philox blocks in bulk. Include inside a target region, after pysparse/shapley_draw.h.

namespace pysparse {
namespace {

inline __m512i xor3(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}

// Which of eight blocks a 64-bit lane works on: the unpacking at the end then gives stream order.
inline __m512i block_lanes() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }

// The four words of eight blocks, word j of a lane's block in the low half of word[j]. The upper
// halves are noise: the multiplication, the only step that mixes places, reads low halves, so that
// nothing has to be moved apart and together again.
struct EightBlocks {
  __m512i word[4];
};

inline EightBlocks philox_eight(const Stream& stream, uint32_t block) {
  const __m512i m0 = _mm512_set1_epi64(int64_t{kPhiloxMultiplier[0]});
  const __m512i m1 = _mm512_set1_epi64(int64_t{kPhiloxMultiplier[1]});
  __m512i x0 = _mm512_set1_epi32(static_cast<int>(stream.low()));
  __m512i x1 = _mm512_set1_epi32(static_cast<int>(stream.high()));
  __m512i x2 = _mm512_set1_epi32(static_cast<int>(stream.purpose));
  __m512i x3 = _mm512_add_epi64(_mm512_set1_epi64(int64_t{block}), block_lanes());
  uint32_t k0 = static_cast<uint32_t>(stream.key), k1 = static_cast<uint32_t>(stream.key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i wide0 = _mm512_mul_epu32(x0, m0), wide1 = _mm512_mul_epu32(x2, m1);
    x0 = xor3(_mm512_srli_epi64(wide1, 32), x1, _mm512_set1_epi32(static_cast<int>(k0)));
    x2 = xor3(_mm512_srli_epi64(wide0, 32), x3, _mm512_set1_epi32(static_cast<int>(k1)));
    x1 = wide1;
    x3 = wide0;
    k0 += kPhiloxWeyl[0];
    k1 += kPhiloxWeyl[1];
  }
  return {{x0, x1, x2, x3}};
}

// Low halves of `a` and, above them, high halves of `b`.
inline __m512i beside(__m512i a, __m512i b) { return _mm512_mask_blend_epi32(0xAAAA, a, b); }

// Words [4 * block, 4 * block + 32) of the stream, in its order.
inline void philox_words(const Stream& stream, uint32_t block, uint32_t* words) {
  const EightBlocks x = philox_eight(stream, block);
  const __m512i first = beside(x.word[0], _mm512_slli_epi64(x.word[1], 32));
  const __m512i second = beside(x.word[2], _mm512_slli_epi64(x.word[3], 32));
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64(first, second));
  _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(first, second));
}

// The steps of 32 players whose low product is below its range are looked at again. Rejections are
// so rare that this test, which lets too many through, costs less than the division.
inline void redraw_rejected(const Stream& stream, const __m512i wide[4], uint32_t step,
                            uint32_t players, uint32_t* partner) {
  constexpr uint32_t kBlocks[8] = {0, 4, 1, 5, 2, 6, 3, 7};
  for (uint32_t j = 0; j < 4; ++j) {
    alignas(64) uint64_t products[8];
    _mm512_store_si512(products, wide[j]);
    for (int lane = 0; lane < 8; ++lane) {
      const uint32_t i = step + 4 * kBlocks[lane] + j, span = players - i;
      if (i < players && static_cast<uint32_t>(products[lane]) < (0u - span) % span)
        partner[i] = i + draw_again(stream, i, span);
    }
  }
}

// partner[step .. step + 32): Lemire's products of the stream's words, straight from their lanes.
inline void draw_steps(const Stream& stream, uint32_t step, uint32_t players, uint32_t* partner) {
  const EightBlocks x = philox_eight(stream, step / 4);
  const __m512i one = _mm512_set1_epi32(1);
  const __m512i left = _mm512_sub_epi32(_mm512_set1_epi32(static_cast<int>(players - step)),
                                        _mm512_slli_epi64(block_lanes(), 2));
  __m512i wide[4];
  unsigned low = 0;
  for (int j = 0; j < 4; ++j) {
    const __m512i range = _mm512_max_epi32(_mm512_sub_epi32(left, _mm512_set1_epi32(j)), one);
    wide[j] = _mm512_mul_epu32(x.word[j], range);
    low |= _mm512_mask_cmplt_epu32_mask(0x5555, wide[j], range);
  }
  const __m512i first = beside(_mm512_srli_epi64(wide[0], 32), wide[1]);
  const __m512i second = beside(_mm512_srli_epi64(wide[2], 32), wide[3]);
  const __m512i at =
      _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(step)),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  _mm512_storeu_si512(partner + step, _mm512_add_epi32(at, _mm512_unpacklo_epi64(first, second)));
  _mm512_storeu_si512(partner + step + 16,
                      _mm512_add_epi32(_mm512_add_epi32(at, _mm512_set1_epi32(16)),
                                       _mm512_unpackhi_epi64(first, second)));
  if (low) redraw_rejected(stream, wide, step, players, partner);
}

inline void draw_partners(const Stream& stream, int64_t players, uint32_t* partner) {
  for (int64_t i = 0; i < players; i += 32)
    draw_steps(stream, static_cast<uint32_t>(i), static_cast<uint32_t>(players), partner);
}

}  // namespace
}  // namespace pysparse
