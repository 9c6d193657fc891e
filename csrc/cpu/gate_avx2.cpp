// y = activation(gate) * up on 8 lanes; bf16 values widen by a shift and round by whole numbers.
#include <type_traits>

#include "isa/avx2.h"
#include "pysparse/fused.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/bfloat16_avx2.h"
#include "simd/gate_vectors.h"
namespace pysparse {
namespace {

struct Vectors {
  using Float = __m256;
  static constexpr int kLanes = 8;

  static Float set(float value) { return _mm256_set1_ps(value); }
  static Float load(const float* p) { return _mm256_load_ps(p); }
  static Float load(const BFloat16* p) {
    return widen_bf16(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, Float v) { _mm256_store_ps(p, v); }
  static void store(BFloat16* p, Float v) {
    _mm_store_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v));
  }
  template <class T>
  static Float round_to(Float v) {
    if constexpr (std::is_same_v<T, float>)
      return v;
    else
      return round_bf16(v);
  }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm256_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float round(Float v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Float negative(Float v, Float a, Float b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_LT_OQ));
  }
  // In two steps: 2^n alone may lie outside the range of normal numbers.
  static Float scale(Float v, Float n) {
    const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return mul(mul(v, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }

 private:
  static Float power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr GatedProduct::Kernel kFloat32{gate_values<Vectors, float>};
constexpr GatedProduct::Kernel kBFloat16{gate_values<Vectors, BFloat16>};
const Register<GatedProduct> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                             {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
