// Softmax attention of 24 rows in fp32 FMAs, 4 keys x 3 vectors in the 16 registers; bf16 values
// are widened when they are packed.
#include <algorithm>
#include <cmath>

#include "isa/avx2.h"
#include "pysparse/attention.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/attention_tile.h"
namespace pysparse {
namespace {

template <class Value>
struct Floats {
  using T = Value;
  using Vector = __m256;
  using Words = __m256i;
  using Mask = __m256;  // all ones in a lane that counts
  static constexpr int kLanes = 8, kVectors = 3, kKeys = 4, kMarkKeys = 6, kKeysPerWord = 1;

  static Vector load(const float* p) { return _mm256_load_ps(p); }
  static Vector load_unaligned(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_store_ps(p, v); }
  static Vector set(float x) { return _mm256_set1_ps(x); }
  static Vector max(Vector a, Vector b) { return _mm256_max_ps(a, b); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
  static Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
  static Vector add_product(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Words load_words(const uint32_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Words broadcast_word(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
  static Words no_words() { return _mm256_setzero_si256(); }
  static Words as_words(Vector v) { return _mm256_castps_si256(v); }
  static Vector as_vector(Words w) { return _mm256_castsi256_ps(w); }
  static Vector dot(Words a, Words b, Vector c) {
    return _mm256_fmadd_ps(as_vector(a), as_vector(b), c);
  }

  // 2^floor(x) times a polynomial in x - floor(x); below 2^-126, and so for -inf, 0.
  static Vector exp2(Vector x) {
    const Vector least = set(-126.0f);
    const Vector some = _mm256_cmp_ps(x, least, _CMP_NLT_UQ);
    const Vector held = _mm256_min_ps(set(127.0f), _mm256_max_ps(least, x));  // keep a NaN
    const Vector whole = _mm256_floor_ps(held), part = _mm256_sub_ps(held, whole);
    Vector p = add_product(set(0.0018775767f), part, set(0.00898934f));
    p = add_product(p, part, set(0.055826318f));
    p = add_product(p, part, set(0.24015361f));
    p = add_product(p, part, set(0.6931531f));
    p = add_product(p, part, set(0.99999994f));
    const Words exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(some, mul(p, as_vector(exponent)));
  }

  static Mask lanes_from(int n) {
    const Words lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return as_vector(_mm256_cmpgt_epi32(lane, _mm256_set1_epi32(n - 1)));
  }
  static Vector select(Mask mask, Vector v) { return blend(mask, v, set(-INFINITY)); }
  static Mask above(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Mask not_below(Vector a, Vector b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); }
  static bool any(Mask mask) { return _mm256_movemask_ps(mask) != 0; }
  static Vector blend(Mask mask, Vector yes, Vector no) { return _mm256_blendv_ps(no, yes, mask); }
  static Vector inverse(Vector v) {  // of 0: 0
    const Mask some = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    return _mm256_and_ps(some, _mm256_div_ps(set(1.0f), v));
  }

  static Words first(int64_t count) {
    const Words lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
  static void store_words(uint32_t* p, Words w, int64_t count) {
    _mm256_maskstore_epi32(reinterpret_cast<int*>(p), first(count), w);
  }
  static Words float_words(const float* p, int64_t count) {
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first(count));
  }
  static Words row_words(const float* p, int64_t count) { return float_words(p, count); }
  static Words row_words(const BFloat16* p, int64_t count) {
    BFloat16 values[kLanes] = {};
    if (count < kLanes) {
      for (int64_t i = 0; i < count; ++i) values[i] = p[i];
      p = values;
    }
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
  }
  static void store_row(float* p, Vector v, int64_t count) {
    _mm256_maskstore_ps(p, first(count), v);
  }
  static void store_row(BFloat16* p, Vector v, int64_t count) {
    alignas(32) float values[kLanes];
    store(values, v);
    for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i) assign(p[i], values[i]);
  }

  static void transpose(Words (&r)[8]) {
    Words t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
template <class T>
constexpr AttentionTile::Kernel kKernel = Tile<Floats<T>>::kernel();
const Register<AttentionTile> registered[] = {{DType::kFloat32, isa::kAvx2, kKernel<float>},
                                              {DType::kBFloat16, isa::kAvx2, kKernel<BFloat16>}};
}  // namespace
}  // namespace pysparse
