// RMSNorm on 16 lanes; squares are summed in 4 vectors of 8 doubles.
#include <cmath>
#include <type_traits>

#include "isa/avx512.h"
#include "pysparse/norm.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/floats_avx512.h"
#include "simd/norm_rows.h"
namespace pysparse {
namespace {

struct Vectors : Floats512 {
  struct Sum {
    __m512d low, high;
  };
  static void add_squares(Sum& sum, Float v) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
    sum.low = _mm512_fmadd_pd(low, low, sum.low);
    sum.high = _mm512_fmadd_pd(high, high, sum.high);
  }
  static double total(const Sum& a, const Sum& b) {
    return _mm512_reduce_add_pd(
        _mm512_add_pd(_mm512_add_pd(a.low, a.high), _mm512_add_pd(b.low, b.high)));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr RmsNorm::Kernel kFloat32{norm_rows<Vectors, float>};
constexpr RmsNorm::Kernel kBFloat16{norm_rows<Vectors, BFloat16>};
const Register<RmsNorm> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                        {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
