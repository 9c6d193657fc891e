// y = W x for fp32 tiles: each half of a mask word expands to 8 rows x 2 columns; lanes of one row
// stay side by side (even and odd column) until the end, where they are added.
#include "isa/avx512.h"
#include "pysparse/linear.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/add_columns_avx512.h"
namespace pysparse {
namespace {

constexpr int kMaxTokens = 8;  // two accumulators a token: 16 of the 32 registers
constexpr int64_t kPrefetchBytes = 4096;

// In place, for the reason given in linear_bitmap_avx512bf16.cpp.
inline __m512 expand(__mmask16 mask, const float* source) {
  __m512 lanes = _mm512_loadu_ps(source);
  asm("vexpandps %0, %0%{%1%}%{z%}" : "+v"(lanes) : "Yk"(mask));
  return lanes;
}

inline __m512 broadcast(const double* pair) { return _mm512_castpd_ps(_mm512_set1_pd(*pair)); }

template <int kTokens>
void run_tokens(const TiledBitmapView& weight, int64_t tile, const void* input,
                const OutputView& output, int64_t first_token) {
  constexpr int kChains = kTokens >= 4 ? 1 : kTokens >= 2 ? 2 : 4;
  const double* pairs = static_cast<const double*>(input);  // a pair of floats, moved as 64 bits
  const uint32_t* masks = weight.masks + tile * weight.pairs();
  const float* next = static_cast<const float*>(weight.values) + weight.tile_offsets[tile];
  __m512 low[kChains][kTokens], high[kChains][kTokens];
  for (int c = 0; c < kChains; ++c)
    for (int t = 0; t < kTokens; ++t) low[c][t] = high[c][t] = _mm512_setzero_ps();
  const auto cell = [&](int64_t p, int c) {
    const uint32_t mask = masks[p];
    const __m512 upper_rows = expand(static_cast<__mmask16>(mask), next);
    next += _mm_popcnt_u32(mask & 0xffffu);
    const __m512 lower_rows = expand(static_cast<__mmask16>(mask >> 16), next);
    next += _mm_popcnt_u32(mask >> 16);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      const __m512 x = broadcast(pairs + p * kTokens + t);
      low[c][t] = _mm512_fmadd_ps(upper_rows, x, low[c][t]);
      high[c][t] = _mm512_fmadd_ps(lower_rows, x, high[c][t]);
    }
  };
  int64_t p = 0;
  for (; p + kChains <= weight.pairs(); p += kChains) {
#pragma GCC unroll 4
    for (int line = 0; line < kChains;
         ++line)  // 64 bytes a cell: what it consumes at 50 % sparsity
      _mm_prefetch(reinterpret_cast<const char*>(next) + kPrefetchBytes + 64 * line, _MM_HINT_T0);
    if (p % 16 == 0)
      _mm_prefetch(reinterpret_cast<const char*>(masks + p) + kPrefetchBytes / 2, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) cell(p + c, c);
  }
  for (; p < weight.pairs(); ++p) cell(p, 0);
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
const Register<BitmapLinear> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
