// Rotary position embedding value by value: the oracle of the others.
#include "isa/generic.h"
#include "simd/rotary_heads.h"

namespace pysparse {
namespace {

struct Scalars {
  static constexpr int64_t kLanes = 0;
};

constexpr Rotary::Kernel kFloat32{rotate_heads<Scalars, float>};
constexpr Rotary::Kernel kBFloat16{rotate_heads<Scalars, BFloat16>};
const Register<Rotary> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                       {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
