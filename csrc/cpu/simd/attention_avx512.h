// 512-bit vectors of a tile of 64 query rows. Included inside a target region, after <algorithm>
// and <cmath>.
#include "simd/transpose_avx512.h"

namespace pysparse {
namespace {

struct Lanes512 {
  using Vector = __m512;
  using Words = __m512i;
  using Mask = __mmask16;
  static constexpr int kLanes = 16, kVectors = 4, kKeys = 4, kMarkKeys = 12;

  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static Vector load_unaligned(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static Vector set(float x) { return _mm512_set1_ps(x); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector add_product(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Words load_words(const uint32_t* p) { return _mm512_load_si512(p); }
  static Words broadcast_word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  static Words no_words() { return _mm512_setzero_si512(); }
  static Words as_words(Vector v) { return _mm512_castps_si512(v); }
  static Vector as_vector(Words w) { return _mm512_castsi512_ps(w); }
  static void transpose(Words (&block)[16]) { pysparse::transpose(block); }

  static Mask first(int64_t count) {
    return static_cast<Mask>(count >= 16 ? 0xffffu : count <= 0 ? 0u : (1u << count) - 1u);
  }
  static Mask lanes_from(int n) {
    return static_cast<Mask>(n <= 0 ? 0xffffu : n >= 16 ? 0u : 0xffffu << n);
  }
  static Vector select(Mask mask, Vector v) {
    return _mm512_mask_blend_ps(mask, _mm512_set1_ps(-INFINITY), v);
  }
  static Mask above(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask not_below(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
  static bool any(Mask mask) { return mask != 0; }
  static Vector blend(Mask mask, Vector yes, Vector no) {
    return _mm512_mask_blend_ps(mask, no, yes);
  }
  static Vector inverse(Vector v) {  // of 0: 0
    const Mask some = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    return _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), v);
  }
  static void store_words(uint32_t* p, Words w, int64_t count) {
    _mm512_mask_storeu_epi32(p, first(count), w);
  }
  static Words float_words(const float* p, int64_t count) {
    return _mm512_maskz_loadu_epi32(first(count), p);
  }
  static void store_row(float* p, Vector v, int64_t count) {
    _mm512_mask_storeu_ps(p, first(count), v);
  }
};

// 2^x = 2^floor(x) 2^(x - floor(x)), the latter by a minimax polynomial on [0, 1): a relative error
// of 7.5e-8 at degree 5, and at degree 3 of 7.5e-5, a fiftieth of bf16's rounding.
template <int kDegree>
inline __m512 exp2_of(__m512 x) {
  const __m512 part = _mm512_reduce_ps(x, 1);  // x - floor(x), 0 for an infinity
  __m512 p;
  if constexpr (kDegree == 3) {
    p = _mm512_fmadd_ps(_mm512_set1_ps(0.07802452f), part, _mm512_set1_ps(0.22606716f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.69583356f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.9999252f));
  } else {
    p = _mm512_fmadd_ps(_mm512_set1_ps(0.0018775767f), part, _mm512_set1_ps(0.00898934f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.055826318f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.24015361f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.6931531f));
    p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(0.99999994f));
  }
  return _mm512_scalef_ps(p, x);  // takes the floor itself
}

}  // namespace
}  // namespace pysparse
