// The sweep on 256-bit vectors along a row: what was kept is skipped, not multiplied by zero.
#include <algorithm>
#include <cstring>

#include "isa/avx2.h"
#include "pysparse/obs.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/obs_rows.h"
namespace pysparse {
namespace {

struct Floats {
  using Vector = __m256;
  static constexpr int kLanes = 8;
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector broadcast(float x) { return _mm256_set1_ps(x); }
  static Vector subtract_product(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ObsSweep::Kernel kKernel{update_rows<Floats>, sweep_rows<Floats>};
const Register<ObsSweep> registered{DType::kFloat32, isa::kAvx2, kKernel};
}  // namespace
}  // namespace pysparse
