// y = W x for a dense weight on 256-bit vectors; bf16 widens by a shift.
#include <cstring>

#include "isa/avx2.h"
#include "pysparse/linear.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/dense_rows.h"
namespace pysparse {
namespace {

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BFloat16* p) {
  const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
}

template <class T>
struct Vector {
  using Element = T;
  using Input = float;
  using Block = __m256;
  using Sum = __m256;
  static constexpr int kLanes = 8, kMaxTokens = 4, kAccumulators = 8;

  static Block load(const Element* p) { return load8(p); }
  static Block load_tail(const Element* p, int64_t count) {
    Element padded[kLanes] = {};
    std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(Element));
    return load8(padded);
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum multiply_add(Block a, const Input* x, Sum sum) {
    return _mm256_fmadd_ps(a, _mm256_loadu_ps(x), sum);
  }
  static float reduce(Sum sum) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    const __m128 quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr DenseLinear::Kernel kFloat32{
    {DType::kFloat32, 8}, Vector<float>::kMaxTokens, dense_rows<Vector<float>>};
constexpr DenseLinear::Kernel kBFloat16{
    {DType::kFloat32, 8}, Vector<BFloat16>::kMaxTokens, dense_rows<Vector<BFloat16>>};
const Register<DenseLinear> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                            {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
