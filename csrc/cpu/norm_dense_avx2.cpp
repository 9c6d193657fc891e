// RMSNorm on 8 lanes; squares are summed in 4 vectors of 4 doubles.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "isa/avx2.h"
#include "pysparse/norm.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/floats_avx2.h"
#include "simd/norm_rows.h"
namespace pysparse {
namespace {

struct Vectors : Floats256 {
  struct Sum {
    __m256d low, high;
  };
  static void add_squares(Sum& sum, Float v) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    sum.low = _mm256_fmadd_pd(low, low, sum.low);
    sum.high = _mm256_fmadd_pd(high, high, sum.high);
  }
  static double total(const Sum& a, const Sum& b) {
    alignas(32) double parts[4];
    _mm256_store_pd(parts,
                    _mm256_add_pd(_mm256_add_pd(a.low, a.high), _mm256_add_pd(b.low, b.high)));
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr RmsNorm::Kernel kFloat32{norm_rows<Vectors, float>};
constexpr RmsNorm::Kernel kBFloat16{norm_rows<Vectors, BFloat16>};
const Register<RmsNorm> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                        {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
