// y = W x for fp32 and bf16 N:M weights on 256-bit vectors: 8 lanes are 4 rows x 2 kept weights;
// their indices, 8 fields of at most 4 bits, come by one broadcast and a shift per lane and pick
// the inputs.
#include "isa/avx2.h"
#include "simd/nm_pattern.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
namespace pysparse {
namespace {

constexpr int kMaxTokens = 2;  // four accumulators a token: 8 of the 16 registers
constexpr int64_t kPrefetchBytes = 3072;

inline __m256 load_weights(const float* source) { return _mm256_loadu_ps(source); }
inline __m256 load_weights(const BFloat16* source) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
}

// Lane i: field i of the bytes, plus the start of its group.
template <class P>
inline __m256i decode(const uint8_t* bytes) {
  constexpr int b = P::kBits, odd = P::group_start(1);
  int32_t fields;
  __builtin_memcpy(&fields, bytes, sizeof fields);
  const __m256i shift = _mm256_setr_epi32(0, b, 2 * b, 3 * b, 4 * b, 5 * b, 6 * b, 7 * b);
  const __m256i index = _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(fields), shift),
                                         _mm256_set1_epi32(P::kMask));
  return _mm256_or_si256(index, _mm256_setr_epi32(0, odd, 0, odd, 0, odd, 0, odd));
}

template <int kCols>
inline __m256 choose(const float* x, __m256i places) {
  if constexpr (kCols == 4) {
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(x)), places);
  } else if constexpr (kCols == 8) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), places);
  } else {
    static_assert(kCols == 16);  // the permute looks at three bits; the fourth chooses the half
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(places, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(x), places),
                            _mm256_permutevar8x32_ps(_mm256_loadu_ps(x + 8), places), upper);
  }
}

template <class T>
struct Of {
  template <class P>
  struct Tile {
    template <int kTokens>
    static void run(const NmView& weight, int64_t tile, const void* input, const OutputView& output,
                    int64_t first_token) {
      const NmLayout& layout = weight.layout;
      const float* x = static_cast<const float*>(input);
      const T* values = static_cast<const T*>(weight.values) + tile * layout.tile_values();
      const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
      __m256 sums[4][kTokens];  // rows 4 part to 4 part + 3 of the tile
      for (auto& part : sums)
        for (auto& sum : part) sum = _mm256_setzero_ps();
      for (int64_t b = 0; b < layout.blocks(); ++b) {
        for (int s = 0; s < P::kSteps; ++s) {
          _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes, _MM_HINT_T0);
#pragma GCC unroll 4
          for (int part = 0; part < 4; ++part) {
            const __m256i places = decode<P>(indices + part * P::kBits);
            const __m256 weights = load_weights(values + 8 * part);
#pragma GCC unroll 2
            for (int t = 0; t < kTokens; ++t)
              sums[part][t] = _mm256_fmadd_ps(weights, choose<P::kCols>(x + t * P::kCols, places),
                                              sums[part][t]);
          }
          values += P::kStepValues;
          indices += P::kStepBytes;
        }
        x += kTokens * P::kCols;
      }
      for (int64_t s = 0; s < layout.tail_steps(); ++s) {
        for (int t = 0; t < kTokens; ++t) {
          double pair;
          __builtin_memcpy(&pair, x + 2 * t, sizeof pair);
          const __m256 inputs = _mm256_castpd_ps(_mm256_set1_pd(pair));
          for (int part = 0; part < 4; ++part)
            sums[part][t] = _mm256_fmadd_ps(load_weights(values + 8 * part), inputs, sums[part][t]);
        }
        values += P::kStepValues;
        x += 2 * kTokens;
      }
      for (int t = 0; t < kTokens; ++t) {
        alignas(32) float lanes[8], rows[kTileRows];
        for (int part = 0; part < 4; ++part) {
          _mm256_store_ps(lanes, sums[part][t]);
          for (int r = 0; r < 4; ++r) rows[4 * part + r] = lanes[2 * r] + lanes[2 * r + 1];
        }
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

  static void run(const NmView& weight, int64_t tile, const void* input, int tokens,
                  const OutputView& output, int64_t first_token) {
    with_pattern<Tokens, 2>(weight.layout, weight, tile, input, tokens, output, first_token);
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr NmLinear::Kernel kFloat32{DType::kFloat32, kMaxTokens, covers_common, Of<float>::run};
constexpr NmLinear::Kernel kBFloat16{DType::kFloat32, kMaxTokens, covers_common, Of<BFloat16>::run};
const Register<NmLinear> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                         {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
