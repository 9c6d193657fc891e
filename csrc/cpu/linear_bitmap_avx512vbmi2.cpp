// y = W x for bf16 tiles without the dot instruction: one expand fills a register with 16 rows x 2
// columns of weights; a shift and a mask widen the two columns to fp32, and two FMAs per token
// consume them.
#include "isa/avx512vbmi2.h"
#include "pysparse/linear.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VBMI2)
namespace pysparse {
namespace {

constexpr int kMaxTokens = 16;
constexpr int64_t kPrefetchBytes = 3072;  // see linear_bitmap_avx512bf16.cpp

// In place, for the reason given in linear_bitmap_avx512bf16.cpp.
inline __m512i expand(__mmask32 mask, const uint16_t* source) {
  __m512i lanes = _mm512_loadu_si512(source);
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(lanes) : "Yk"(mask));
  return lanes;
}

template <int kTokens>
void run_tokens(const TiledBitmapView& weight, int64_t tile, const void* input,
                const OutputView& output, int64_t first_token) {
  constexpr int kChains = kTokens >= 4   ? 1
                          : kTokens >= 2 ? 2
                                         : 4;  // cells in flight, two sums each
  constexpr bool kSplit =
      kTokens <= 8;  // even and odd columns in sums of their own, while registers last
  constexpr int kSums = kSplit ? 2 : 1;
  constexpr int kLines = (kChains + 1) / 2;  // of 64 bytes: what the cells consume at 50 % sparsity
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const float* pairs = static_cast<const float*>(input);
  const uint32_t* masks = weight.masks + tile * weight.pairs();
  const uint16_t* next = static_cast<const uint16_t*>(weight.values) + weight.tile_offsets[tile];
  __m512 sums[kChains][kSums][kTokens];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 2
    for (int s = 0; s < kSums; ++s)
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) sums[c][s][t] = _mm512_setzero_ps();
  const auto cell = [&](int64_t p, int c) __attribute__((always_inline)) {
    const uint32_t mask = masks[p];
    const __m512i weights = expand(mask, next);
    next += _mm_popcnt_u32(mask);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(weights, high_half));
    const float* x = pairs + 2 * p * kTokens;
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      sums[c][0][t] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[2 * t]), sums[c][0][t]);
      sums[c][kSums - 1][t] =
          _mm512_fmadd_ps(odd, _mm512_set1_ps(x[2 * t + 1]), sums[c][kSums - 1][t]);
    }
  };
  int64_t p = 0;
  for (; p + kChains <= weight.pairs(); p += kChains) {
#pragma GCC unroll 2
    for (int line = 0; line < kLines; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(next) + kPrefetchBytes + 64 * line, _MM_HINT_T0);
    if (p % 16 == 0)
      _mm_prefetch(reinterpret_cast<const char*>(masks + p) + kPrefetchBytes / 2, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) cell(p + c, c);
  }
  for (; p < weight.pairs(); ++p) cell(p, 0);
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    __m512 total = sums[0][0][t];
#pragma GCC unroll 8
    for (int i = 1; i < kChains * kSums; ++i)
      total = _mm512_add_ps(total, sums[i / kSums][i % kSums][t]);
    alignas(64) float rows[kTileRows];
    _mm512_store_ps(rows, total);
    store_rows(rows, tile * kTileRows, kTileRows, first_token + t, output);
  }
}

struct Tile {
  template <int kTokens>
  static void run(const TiledBitmapView& weight, int64_t tile, const void* input,
                  const OutputView& output, int64_t first_token) {
    run_tokens<kTokens>(weight, tile, input, output, first_token);
  }
};

void run(const TiledBitmapView& weight, int64_t tile, const void* input, int tokens,
         const OutputView& output, int64_t first_token) {
  kTokenTable<Tile, kMaxTokens>[tokens - 1](weight, tile, input, output, first_token);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr BitmapLinear::Kernel kKernel{{DType::kFloat32, 2}, kMaxTokens, run};
const Register<BitmapLinear> registered{DType::kBFloat16, isa::kAvx512Vbmi2, kKernel};
}  // namespace
}  // namespace pysparse
