// The sweep on 512-bit vectors along a row: what was kept is skipped, not multiplied by zero.
#include <algorithm>
#include <cstring>

#include "isa/avx512.h"
#include "pysparse/obs.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/obs_rows.h"
namespace pysparse {
namespace {

struct Floats {
  using Vector = __m512;
  static constexpr int kLanes = 16;
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(float x) { return _mm512_set1_ps(x); }
  static Vector subtract_product(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ObsSweep::Kernel kKernel{update_rows<Floats>, sweep_rows<Floats>};
const Register<ObsSweep> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
