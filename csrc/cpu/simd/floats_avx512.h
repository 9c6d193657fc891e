#pragma once
// 16 float32 lanes as a vector policy; bf16 values widen by a shift and round by whole numbers.
// Include inside the target region, after <type_traits> and dtype.h.
#include "simd/bfloat16_avx512.h"

namespace pysparse {
namespace {

struct Floats512 {
  using Float = __m512;
  static constexpr int kLanes = 16;

  static Float set(float value) { return _mm512_set1_ps(value); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const BFloat16* p) {
    return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static void store(BFloat16* p, Float v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v));
  }
  template <class T>
  static Float round_to(Float v) {
    if constexpr (std::is_same_v<T, float>)
      return v;
    else
      return round_bf16(v);
  }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float div(Float a, Float b) { return _mm512_div_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float round(Float v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Float negative(Float v, Float a, Float b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_LT_OQ), a);
  }
  static Float scale(Float v, Float n) { return _mm512_scalef_ps(v, n); }
  static float sum(Float v) { return _mm512_reduce_add_ps(v); }
  static float largest(Float v) { return _mm512_reduce_max_ps(v); }
};

}  // namespace
}  // namespace pysparse
