// y = W x by pairs on fp32 lanes: each weight of a pair is broadcast and meets 64 tokens. bf16
// weights widen by a shift and a mask, which costs little beside eight FMAs.
#include "isa/avx512.h"
#include "pysparse/linear.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/pairs_avx512.h"
namespace pysparse {
namespace {

template <class Weights>
struct FloatPairs {
  using Entry = typename Weights::Entry;
  using Input = float;
  using Sum = __m512;
  static constexpr int kLanes = 16, kRows = 4;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Sum sum) { _mm512_store_ps(p, sum); }

  template <int kVectors>
  static void add(const Entry& entry, const float* x0, const float* x1, Sum (&sums)[kVectors]) {
    const __m512 w0 = Weights::low(entry), w1 = Weights::high(entry);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[v] = _mm512_fmadd_ps(w0, _mm512_load_ps(x0 + 16 * v), sums[v]);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[v] = _mm512_fmadd_ps(w1, _mm512_load_ps(x1 + 16 * v), sums[v]);
  }
};

struct Float32 {
  struct Entry {
    float low, high;
  };
  static __m512 low(const Entry& entry) { return _mm512_set1_ps(entry.low); }
  static __m512 high(const Entry& entry) { return _mm512_set1_ps(entry.high); }
};

struct BFloat16Weights {
  using Entry = int32_t;  // low half first
  static __m512 low(Entry entry) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_set1_epi32(entry), 16));
  }
  static __m512 high(Entry entry) {
    const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_set1_epi32(entry), high_half));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr PairsLinear::Kernel kFloat32{DType::kFloat32, 64, transpose_to_float<float>,
                                       run_pairs<FloatPairs<Float32>, float>};
constexpr PairsLinear::Kernel kBFloat16{DType::kFloat32, 32, transpose_to_float<BFloat16>,
                                        run_pairs<FloatPairs<BFloat16Weights>, BFloat16>};
const Register<PairsLinear> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                            {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
