#pragma once
// 8 float32 lanes as a vector policy; bf16 values widen by a shift and round by whole numbers.
// Include inside the target region, after <algorithm>, <type_traits> and
// dtype.h.
#include "simd/bfloat16_avx2.h"

namespace pysparse {
namespace {

struct Floats256 {
  using Float = __m256;
  static constexpr int kLanes = 8;

  static Float set(float value) { return _mm256_set1_ps(value); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const BFloat16* p) {
    return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static void store(BFloat16* p, Float v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v));
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
  static float sum(Float v) {
    alignas(32) float p[8];
    _mm256_store_ps(p, v);
    return ((p[0] + p[1]) + (p[2] + p[3])) + ((p[4] + p[5]) + (p[6] + p[7]));
  }
  static float largest(Float v) {
    alignas(32) float p[8];
    _mm256_store_ps(p, v);
    return *std::max_element(p, p + 8);
  }

 private:
  static Float power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
}  // namespace pysparse
