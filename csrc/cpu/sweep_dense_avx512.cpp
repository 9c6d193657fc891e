// The sweep on 512-bit vectors: updates along a row, where what was kept is skipped and not
// multiplied by zero; pruning with sixteen rows in the lanes.
#include <algorithm>
#include <cstring>

#include "isa/avx512.h"
#include "pysparse/obs.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/obs_lanes_avx512.h"
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

template <int kGroup>
void sweep_in_lanes(const ObsStrip& strip, const ObsErrors& errors, int64_t begin, int64_t end) {
  if (strip.grid.steps) return sweep_lanes<kGroup, true>(strip, errors, begin, end);
  sweep_lanes<kGroup, false>(strip, errors, begin, end);
}

// Groups that do not part a chunk are chosen row by row.
void sweep(const ObsStrip& strip, const ObsErrors& errors, int64_t begin, int64_t end) {
  if (!strip.n) return sweep_in_lanes<0>(strip, errors, begin, end);
  if (strip.m == 4) return sweep_in_lanes<4>(strip, errors, begin, end);
  if (strip.m == 8) return sweep_in_lanes<8>(strip, errors, begin, end);
  sweep_rows<Floats>(strip, errors, begin, end);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ObsSweep::Kernel kKernel{update_rows<Floats>, sweep};
const Register<ObsSweep> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
