// y = W x for bf16 tiles: one expand fills a register with 16 rows x 2 columns of weights, one
// widening dot per token consumes it against the broadcast input pair.
#include "isa/avx512bf16.h"
#include "pysparse/linear.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512BF16)
#include "simd/short_cells.h"
namespace pysparse {
namespace {

constexpr int kMaxTokens = 16;
constexpr int kHalfCell = 16;
constexpr int kShortTokens = 2;  // beyond, dots take the time and not loads
// How far ahead the streams are asked for. The hardware's prefetcher stops at a page's end and
// starts late; without this, a cold weight is read at 12 GB/s instead of 20 (two cores of a Xeon,
// 70 % sparse).
constexpr int64_t kPrefetchBytes = 3072;

// In place on purpose: on Zen 5 an expand waits for the old content of its destination register, so
// letting the compiler pick one register for all of them makes a chain of independent expands
// serial.
inline __m512bh expand(__mmask32 mask, __m512i lanes) {
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(lanes) : "Yk"(mask));
  return reinterpret_cast<__m512bh>(lanes);
}

inline __m512bh broadcast(const uint32_t* pair) {
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*pair)));
}

// The weights of one tile, cell after cell.
struct Cells {
  const uint32_t* masks;
  const uint16_t* next;

  // kShort: most cells keep half their weights or less (simd/short_cells.h).
  template <bool kShort>
  __m512bh take(int64_t p) {
    const uint32_t mask = masks[p];
    const int count = _mm_popcnt_u32(mask);
    const __m512i packed =
        kShort && __builtin_expect(count <= kHalfCell, 1)
            ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)))
            : _mm512_loadu_si512(next);
    next += count;
    return expand(mask, packed);
  }

  template <int kLines>  // of 64 bytes
  void prefetch(int64_t p) const {
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line)
      _mm_prefetch(reinterpret_cast<const char*>(next) + kPrefetchBytes + 64 * line, _MM_HINT_T0);
    if (p % 16 == 0)
      _mm_prefetch(reinterpret_cast<const char*>(masks + p) + kPrefetchBytes / 2, _MM_HINT_T0);
  }
};

template <int kTokens>
inline void multiply_add(__m512bh weights, const uint32_t* pairs, __m512 (&sums)[kTokens]) {
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t)
    sums[t] = _mm512_dpbf16_ps(sums[t], weights, broadcast(pairs + t));
}

// Few tokens: several cells in flight, each with sums of its own, hide the latency of a dot.
template <bool kShort, int kTokens>
inline void multiply_chains(Cells cells, int64_t count, const uint32_t* pairs,
                            __m512 (&total)[kTokens]) {
  constexpr int kChains = kTokens >= 4 ? 2 : kTokens >= 2 ? 4 : 8;
  constexpr int kLines = (kChains + 1) / 2;  // what the chains consume at 50 % sparsity
  __m512 sums[kChains][kTokens];
#pragma GCC unroll 8
  for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sums[c][t] = _mm512_setzero_ps();
  int64_t p = 0;
  for (; p + kChains <= count; p += kChains) {
    cells.prefetch<kLines>(p);
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c)
      multiply_add(cells.take<kShort>(p + c), pairs + (p + c) * kTokens, sums[c]);
  }
  for (; p < count; ++p) multiply_add(cells.take<kShort>(p), pairs + p * kTokens, sums[0]);
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t) {
    total[t] = sums[0][t];
#pragma GCC unroll 8
    for (int c = 1; c < kChains; ++c) total[t] = _mm512_add_ps(total[t], sums[c][t]);
  }
}

// Many tokens fill the pipes with dots, but only if a cell is expanded while the one before is
// multiplied: in turn, 16 tokens take 19.9 cycles a cell on Zen 4, so 17.4, the dots alone 15.9.
template <int kTokens>
inline void multiply_ahead(Cells cells, int64_t count, const uint32_t* pairs,
                           __m512 (&sums)[kTokens]) {
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) sums[t] = _mm512_setzero_ps();
  if (count == 0) return;
  __m512bh weights = cells.take<false>(0);
  for (int64_t p = 0; p + 1 < count; ++p) {
    cells.prefetch<1>(p);
    const __m512bh following = cells.take<false>(p + 1);
    multiply_add(weights, pairs + p * kTokens, sums);
    weights = following;
  }
  multiply_add(weights, pairs + (count - 1) * kTokens, sums);
}

template <int kTokens>
void run_tokens(const TiledBitmapView& weight, int64_t tile, const void* input,
                const OutputView& output, int64_t first_token) {
  const uint32_t* pairs = static_cast<const uint32_t*>(input);
  const Cells cells{weight.masks + tile * weight.pairs(),
                    static_cast<const uint16_t*>(weight.values) + weight.tile_offsets[tile]};
  __m512 sums[kTokens];
  if constexpr (kTokens >= 8)
    multiply_ahead(cells, weight.pairs(), pairs, sums);
  else if (kTokens <= kShortTokens && mostly_short(cells.masks, weight.pairs()))
    multiply_chains<true>(cells, weight.pairs(), pairs, sums);
  else
    multiply_chains<false>(cells, weight.pairs(), pairs, sums);
  for (int t = 0; t < kTokens; ++t) {
    alignas(64) float rows[kTileRows];
    _mm512_store_ps(rows, sums[t]);
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
constexpr BitmapLinear::Kernel kKernel{{DType::kBFloat16, 2}, kMaxTokens, run};
const Register<BitmapLinear> registered{DType::kBFloat16, isa::kAvx512Bf16, kKernel};
}  // namespace
}  // namespace pysparse
