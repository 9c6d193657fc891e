// y = W x for bf16 N:M weights: a register holds 16 rows x 2 kept weights; their indices pick the
// inputs of a block by one permute per token, and a widening dot takes the pairs. No mask, no
// count.
#include "isa/avx512bf16.h"
#include "simd/nm_pattern.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512BF16)
#include "simd/nm_decode_avx512.h"
namespace pysparse {
namespace {

constexpr int kMaxTokens = 8;
constexpr int64_t kPrefetchBytes = 3072;  // see linear_bitmap_avx512bf16.cpp

inline __m512bh as_bf16(__m512i lanes) { return reinterpret_cast<__m512bh>(lanes); }

// The inputs of one block, wherever an index may look for them.
template <int kCols>
inline __m512i load_inputs(const uint16_t* x) {
  if constexpr (kCols == 4) {
    int64_t four;
    __builtin_memcpy(&four, x, sizeof four);
    return _mm512_set1_epi64(four);
  } else if constexpr (kCols == 8) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  } else {
    static_assert(kCols == 16);
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
}

template <class P>
struct Tile {
  template <int kTokens>
  static void run(const NmView& weight, int64_t tile, const void* input, const OutputView& output,
                  int64_t first_token) {
    constexpr int kChains = kTokens >= 4 ? 2 : kTokens >= 2 ? 4 : 8;  // steps in flight
    constexpr int kBlocks = kChains / P::kSteps;
    const NmLayout& layout = weight.layout;
    const uint16_t* x = static_cast<const uint16_t*>(input);
    const uint16_t* values =
        static_cast<const uint16_t*>(weight.values) + tile * layout.tile_values();
    const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
    __m512 sums[kChains][kTokens];
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) sums[c][t] = _mm512_setzero_ps();
    const auto block = [&](int first_chain) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int s = 0; s < P::kSteps; ++s) {
        const __m512i places = decode_words<P>(indices);
        const __m512i weights = _mm512_loadu_si512(values);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const __m512i chosen =
              _mm512_permutexvar_epi16(places, load_inputs<P::kCols>(x + t * P::kCols));
          sums[first_chain + s][t] =
              _mm512_dpbf16_ps(sums[first_chain + s][t], as_bf16(weights), as_bf16(chosen));
        }
        values += P::kStepValues;
        indices += P::kStepBytes;
      }
      x += kTokens * P::kCols;
    };
    int64_t b = 0;
    for (; b + kBlocks <= layout.blocks(); b += kBlocks) {
#pragma GCC unroll 8
      for (int c = 0; c < kBlocks; ++c) {
#pragma GCC unroll 2
        for (int s = 0; s < P::kSteps; ++s)
          _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes + 64 * s,
                       _MM_HINT_T0);
        if (c % 2 == 0)
          _mm_prefetch(reinterpret_cast<const char*>(indices) + kPrefetchBytes / 4, _MM_HINT_T0);
        block(c * P::kSteps);
      }
    }
    for (; b < layout.blocks(); ++b) block(0);
    for (int64_t s = 0; s < layout.tail_steps(); ++s) {
      const __m512i weights = _mm512_loadu_si512(values);
      for (int t = 0; t < kTokens; ++t) {
        int32_t pair;
        __builtin_memcpy(&pair, x + 2 * t, sizeof pair);
        sums[0][t] =
            _mm512_dpbf16_ps(sums[0][t], as_bf16(weights), as_bf16(_mm512_set1_epi32(pair)));
      }
      values += P::kStepValues;
      x += 2 * kTokens;
    }
    for (int t = 0; t < kTokens; ++t) {
      for (int c = 1; c < kChains; ++c) sums[0][t] = _mm512_add_ps(sums[0][t], sums[c][t]);
      alignas(64) float rows[kTileRows];
      _mm512_store_ps(rows, sums[0][t]);
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
constexpr NmLinear::Kernel kKernel{DType::kBFloat16, kMaxTokens, covers_common, run};
const Register<NmLinear> registered{DType::kBFloat16, isa::kAvx512Bf16, kKernel};
}  // namespace
}  // namespace pysparse
