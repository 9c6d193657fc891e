#pragma once
// What the 512-bit pair kernels share: 16 x 16 transposes of activations and of sums.
// Include inside the target region: everything here is in an unnamed namespace.
#include "simd/pairs_rows.h"

namespace pysparse {
namespace {

// Transposes 16 rows of 16 32-bit words, in registers.
inline void transpose_words(__m512i (&row)[16]) {
  __m512i next[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // words of rows i and i + 1 alternate
    next[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
    next[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // row[i + j]: column j of each lane's four, rows i to i + 3
    row[i] = _mm512_unpacklo_epi64(next[i], next[i + 2]);
    row[i + 1] = _mm512_unpackhi_epi64(next[i], next[i + 2]);
    row[i + 2] = _mm512_unpacklo_epi64(next[i + 1], next[i + 3]);
    row[i + 3] = _mm512_unpackhi_epi64(next[i + 1], next[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // gather the lanes: lane l of row[4 i + j] is column 4 l + j
    const __m512i even_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(row[j], row[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(row[8 + j], row[12 + j], 0xdd);
    next[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    next[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    next[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    next[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) row[i] = next[i];
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
}

// Bits of the lanes that hold an infinity or a NaN.
inline __mmask16 non_finite(__m512i words) {
  const __m512i exponent = _mm512_set1_epi32(0x7f800000);
  return _mm512_cmpeq_epi32_mask(_mm512_and_si512(words, exponent), exponent);
}

inline __m512i load_words(const float* x, __mmask16 lanes) {
  return _mm512_maskz_loadu_epi32(lanes, x);
}
inline __m512i load_words(const BFloat16* x, __mmask16 lanes) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x)), 16);
}

// See PairsLinear::Kernel::transpose: to fp32, tokens in order.
template <class T>
bool transpose_to_float(const void* x, int64_t cols, int tokens, int width, int64_t begin,
                        int64_t end, void* input) {
  __mmask16 special = 0;
  for (int64_t k = begin; k < end; k += 16) {
    const __mmask16 lanes = first_lanes(end - k);
    for (int t = 0; t < width; t += 16) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        row[i] = t + i < tokens ? load_words(static_cast<const T*>(x) + (t + i) * cols + k, lanes)
                                : _mm512_setzero_si512();
        special |= non_finite(row[i]);
      }
      transpose_words(row);
      float* out = static_cast<float*>(input) + k * width + t;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (lanes >> i & 1) _mm512_store_si512(out + i * width, row[i]);
    }
  }
  return special == 0;
}

// Rounds to bf16 as assign() does, which the kernels of few tokens use.
inline __m256i round_to_bf16(__m512 sums) {
  const __m512i bits = _mm512_castps_si512(sums);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(sums, sums, _CMP_UNORD_Q);
  const __m512i high = _mm512_srli_epi32(rounded, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(high, nan, _mm512_set1_epi32(0x7fc0)));
}

inline void store_lanes(float* y, const float* bias, __mmask16 lanes, __m512 sums) {
  if (bias) sums = _mm512_add_ps(sums, _mm512_maskz_loadu_ps(lanes, bias));
  _mm512_mask_storeu_ps(y, lanes, sums);
}
inline void store_lanes(BFloat16* y, const BFloat16* bias, __mmask16 lanes, __m512 sums) {
  if (bias) sums = _mm512_add_ps(sums, _mm512_castsi512_ps(load_words(bias, lanes)));
  _mm256_mask_storeu_epi16(y, lanes, round_to_bf16(sums));
}

// Writes sums[row][width] of a block of rows to the outputs of its tokens.
template <class T>
void store_block(const float* sums, int64_t first_row, int64_t rows, int tokens, int width,
                 const OutputView& output, int64_t first_token) {
  const T* bias = static_cast<const T*>(output.bias);
  for (int64_t r = 0; r < rows; r += 16) {
    const __mmask16 lanes = first_lanes(rows - r);
    for (int t = 0; t < tokens; t += 16) {
      __m512i row[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) row[i] = _mm512_load_si512(sums + (r + i) * width + t);
      transpose_words(row);
      T* y = static_cast<T*>(output.values) + (first_token + t) * output.rows + first_row + r;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        if (t + i < tokens)
          store_lanes(y + i * output.rows, bias ? bias + first_row + r : nullptr, lanes,
                      _mm512_castsi512_ps(row[i]));
    }
  }
}

// `Narrow` is the policy for 16 tokens.
template <class P, class T, class Narrow = P>
void run_pairs(const PairsView& weight, int64_t row_block, const void* input, int tokens, int width,
               void* scratch, const OutputView& output, int64_t first_token) {
  const auto* x = static_cast<const typename P::Input*>(input);
  float* sums = static_cast<float*>(scratch);
  if (width == PairsLinear::kNarrowest)
    pairs_block<Narrow, PairsLinear::kNarrowest / Narrow::kLanes>(weight, row_block, x, sums);
  else if (width == PairsLinear::kNarrow)
    pairs_block<P, PairsLinear::kNarrow / P::kLanes>(weight, row_block, x, sums);
  else
    pairs_block<P, PairsLinear::kWidest / P::kLanes>(weight, row_block, x, sums);
  store_block<T>(sums, row_block * kPairRows, weight.rows_in(row_block), tokens, width, output,
                 first_token);
}

}  // namespace
}  // namespace pysparse
