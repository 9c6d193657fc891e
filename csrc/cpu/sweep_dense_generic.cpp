// The sweep one weight at a time: the oracle.
#include <algorithm>
#include <cstring>

#include "isa/generic.h"
#include "pysparse/obs.h"
#include "simd/obs_rows.h"

namespace pysparse {
namespace {

struct Floats {
  using Vector = float;
  static constexpr int kLanes = 1;
  static Vector load(const float* p) { return *p; }
  static void store(float* p, Vector v) { *p = v; }
  static Vector broadcast(float x) { return x; }
  static Vector subtract_product(Vector a, Vector b, Vector c) { return c - a * b; }
};

constexpr ObsSweep::Kernel kKernel{update_rows<Floats>, sweep_rows<Floats>};
const Register<ObsSweep> registered{DType::kFloat32, isa::kGeneric, kKernel};

}  // namespace
}  // namespace pysparse
