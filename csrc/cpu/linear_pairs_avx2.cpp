// y = W x by pairs on 256-bit vectors: up to 32 tokens at a time, two rows of a group in the 16
// registers.
#include "isa/avx2.h"
#include "pysparse/linear.h"
#include "simd/pairs_scalar.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/pairs_rows.h"
namespace pysparse {
namespace {

template <class Weights>
struct FloatPairs {
  using Entry = typename Weights::Entry;
  using Input = float;
  using Sum = __m256;
  static constexpr int kLanes = 8, kRows = 2;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Sum sum) { _mm256_store_ps(p, sum); }

  template <int kVectors>
  static void add(const Entry& entry, const float* x0, const float* x1, Sum (&sums)[kVectors]) {
    const __m256 w0 = Weights::low(entry), w1 = Weights::high(entry);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[v] = _mm256_fmadd_ps(w0, _mm256_load_ps(x0 + 8 * v), sums[v]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[v] = _mm256_fmadd_ps(w1, _mm256_load_ps(x1 + 8 * v), sums[v]);
  }
};

struct Float32 {
  struct Entry {
    float low, high;
  };
  static __m256 low(const Entry& entry) { return _mm256_set1_ps(entry.low); }
  static __m256 high(const Entry& entry) { return _mm256_set1_ps(entry.high); }
};

struct BFloat16Weights {
  using Entry = int32_t;  // low half first
  static __m256 low(Entry entry) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_set1_epi32(entry), 16));
  }
  static __m256 high(Entry entry) {
    const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_set1_epi32(entry), high_half));
  }
};

template <class P>
void run(const PairsView& weight, int64_t row_block, const void* input, int tokens, int width,
         void* scratch, const OutputView& output, int64_t first_token) {
  const auto* x = static_cast<const float*>(input);
  float* sums = static_cast<float*>(scratch);
  if (width == PairsLinear::kNarrowest)
    pairs_block<P, PairsLinear::kNarrowest / P::kLanes>(weight, row_block, x, sums);
  else
    pairs_block<P, PairsLinear::kNarrow / P::kLanes>(weight, row_block, x, sums);
  store_pairs(sums, row_block * kPairRows, weight.rows_in(row_block), tokens, width, output,
              first_token);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr PairsLinear::Kernel kFloat32{DType::kFloat32, 32, transpose_scalar<float>,
                                       run<FloatPairs<Float32>>};
constexpr PairsLinear::Kernel kBFloat16{DType::kFloat32, 32, transpose_scalar<BFloat16>,
                                        run<FloatPairs<BFloat16Weights>>};
const Register<PairsLinear> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                            {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
