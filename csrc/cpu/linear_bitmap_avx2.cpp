// y = W x on 256-bit vectors: each byte of a mask word expands to 4 rows x 2 columns in fp32, by a
// table of shuffles; bf16 values widen by a shift. Even and odd columns are added at the end.
#include "isa/avx2.h"
#include "pysparse/linear.h"
#include "simd/expand_avx2.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
namespace pysparse {
namespace {

constexpr int kMaxTokens = 2;  // four accumulators a token: 8 of the 16 registers
constexpr int64_t kPrefetchBytes = 4096;

inline __m256 expand(uint32_t mask, const BFloat16* source) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  const __m128i shuffle =
      _mm_load_si128(reinterpret_cast<const __m128i*>(kExpandTables.words[mask]));
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_shuffle_epi8(packed, shuffle));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

inline __m256 expand(uint32_t mask, const float* source) {
  const __m256i lanes =
      _mm256_load_si256(reinterpret_cast<const __m256i*>(kExpandTables.lanes[mask]));
  const __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(source), lanes);
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i kept = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit);
  return _mm256_and_ps(moved, _mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, bit)));
}

inline __m256 broadcast(const double* pair) { return _mm256_castpd_ps(_mm256_broadcast_sd(pair)); }

template <class T, int kTokens>
void run_tokens(const TiledBitmapView& weight, int64_t tile, const void* input,
                const OutputView& output, int64_t first_token) {
  const double* pairs = static_cast<const double*>(input);  // a pair of floats, moved as 64 bits
  const uint32_t* masks = weight.masks + tile * weight.pairs();
  const T* next = static_cast<const T*>(weight.values) + weight.tile_offsets[tile];
  __m256 sums[4][kTokens];  // rows 4 b to 4 b + 3 of the tile
  for (auto& part : sums)
    for (auto& sum : part) sum = _mm256_setzero_ps();
  for (int64_t p = 0; p < weight.pairs(); ++p) {
    _mm_prefetch(reinterpret_cast<const char*>(next) + kPrefetchBytes, _MM_HINT_T0);
    const uint32_t mask = masks[p];
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
      const uint32_t byte = mask >> (8 * b) & 0xffu;
      const __m256 weights = expand(byte, next);
      next += _mm_popcnt_u32(byte);
#pragma GCC unroll 2
      for (int t = 0; t < kTokens; ++t)
        sums[b][t] = _mm256_fmadd_ps(weights, broadcast(pairs + p * kTokens + t), sums[b][t]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    alignas(32) float lanes[8], rows[kTileRows];
    for (int b = 0; b < 4; ++b) {
      _mm256_store_ps(lanes, sums[b][t]);
      for (int r = 0; r < 4; ++r) rows[4 * b + r] = lanes[2 * r] + lanes[2 * r + 1];
    }
    store_rows(rows, tile * kTileRows, kTileRows, first_token + t, output);
  }
}

template <class T>
struct Tile {
  template <int kTokens>
  static void run(const TiledBitmapView& weight, int64_t tile, const void* input,
                  const OutputView& output, int64_t first_token) {
    run_tokens<T, kTokens>(weight, tile, input, output, first_token);
  }
};

template <class T>
void run(const TiledBitmapView& weight, int64_t tile, const void* input, int tokens,
         const OutputView& output, int64_t first_token) {
  kTokenTable<Tile<T>, kMaxTokens>[tokens - 1](weight, tile, input, output, first_token);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr BitmapLinear::Kernel kFloat32{{DType::kFloat32, 2}, kMaxTokens, run<float>};
constexpr BitmapLinear::Kernel kBFloat16{{DType::kFloat32, 2}, kMaxTokens, run<BFloat16>};
const Register<BitmapLinear> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                             {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
