// y = W x for fp32 N:M weights: a step is two registers of 8 rows x 2 kept weights; their indices
// pick the inputs of a block by a permute per token. The two sums of a row are added at the end.
#include "isa/avx512.h"
#include "simd/nm_pattern.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/add_columns_avx512.h"
#include "simd/nm_decode_avx512.h"
namespace pysparse {
namespace {

constexpr int kMaxTokens = 8;
constexpr int64_t kPrefetchBytes = 4096;

template <int kCols>
inline __m512 load_inputs(const float* x) {
  if constexpr (kCols == 4) {
    return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
  } else if constexpr (kCols == 8) {
    return _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
  } else {
    static_assert(kCols == 16);
    return _mm512_loadu_ps(x);
  }
}

template <class P>
struct Tile {
  template <int kTokens>
  static void run(const NmView& weight, int64_t tile, const void* input, const OutputView& output,
                  int64_t first_token) {
    constexpr int kChains = kTokens >= 4 ? 1 : kTokens >= 2 ? 2 : 4;
    const NmLayout& layout = weight.layout;
    const float* x = static_cast<const float*>(input);
    const float* values = static_cast<const float*>(weight.values) + tile * layout.tile_values();
    const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
    __m512 low[kChains][kTokens], high[kChains][kTokens];
    for (int c = 0; c < kChains; ++c)
      for (int t = 0; t < kTokens; ++t) low[c][t] = high[c][t] = _mm512_setzero_ps();
    const auto block = [&](int c) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int s = 0; s < P::kSteps; ++s) {
        const __m512i upper = decode_dwords<P, 0>(indices), lower = decode_dwords<P, 1>(indices);
        const __m512 upper_rows = _mm512_loadu_ps(values);
        const __m512 lower_rows = _mm512_loadu_ps(values + 16);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const __m512 inputs = load_inputs<P::kCols>(x + t * P::kCols);
          low[c][t] = _mm512_fmadd_ps(upper_rows, _mm512_permutexvar_ps(upper, inputs), low[c][t]);
          high[c][t] =
              _mm512_fmadd_ps(lower_rows, _mm512_permutexvar_ps(lower, inputs), high[c][t]);
        }
        values += P::kStepValues;
        indices += P::kStepBytes;
      }
      x += kTokens * P::kCols;
    };
    int64_t b = 0;
    for (; b + kChains <= layout.blocks(); b += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 4
        for (int line = 0; line < 2 * P::kSteps; ++line)
          _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes + 64 * line,
                       _MM_HINT_T0);
        if (c % 2 == 0)
          _mm_prefetch(reinterpret_cast<const char*>(indices) + kPrefetchBytes / 8, _MM_HINT_T0);
        block(c);
      }
    }
    for (; b < layout.blocks(); ++b) block(0);
    for (int64_t s = 0; s < layout.tail_steps(); ++s) {
      for (int t = 0; t < kTokens; ++t) {
        double pair;
        __builtin_memcpy(&pair, x + 2 * t, sizeof pair);
        const __m512 inputs = _mm512_castpd_ps(_mm512_set1_pd(pair));
        low[0][t] = _mm512_fmadd_ps(_mm512_loadu_ps(values), inputs, low[0][t]);
        high[0][t] = _mm512_fmadd_ps(_mm512_loadu_ps(values + 16), inputs, high[0][t]);
      }
      values += P::kStepValues;
      x += 2 * kTokens;
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int c = 1; c < kChains; ++c) {
        low[0][t] = _mm512_add_ps(low[0][t], low[c][t]);
        high[0][t] = _mm512_add_ps(high[0][t], high[c][t]);
      }
      alignas(64) float rows[kTileRows];
      _mm512_store_ps(rows, add_columns(low[0][t], high[0][t]));
      store_rows(rows, tile * kTileRows, kTileRows, first_token + t, output);
    }
  }
};

template <class P>
struct Tokens {
  static void run(const NmView& weight, int64_t tile, const void* input, int tokens,
                  const OutputView& output, int64_t first_token) {
    kTokenTable<Tile<P>, kMaxTokens>[tokens - 1](weight, tile, input, output, first_token);
  }
};

void run(const NmView& weight, int64_t tile, const void* input, int tokens,
         const OutputView& output, int64_t first_token) {
  with_pattern<Tokens, 2>(weight.layout, weight, tile, input, tokens, output, first_token);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr NmLinear::Kernel kKernel{DType::kFloat32, kMaxTokens, covers_common, run};
const Register<NmLinear> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
