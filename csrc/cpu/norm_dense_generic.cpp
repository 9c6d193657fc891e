// RMSNorm value by value: the oracle of the others.
#include <cmath>

#include "isa/generic.h"
#include "simd/norm_rows.h"

namespace pysparse {
namespace {

struct Scalars {
  static constexpr int64_t kLanes = 0;
};

constexpr RmsNorm::Kernel kFloat32{norm_rows<Scalars, float>};
constexpr RmsNorm::Kernel kBFloat16{norm_rows<Scalars, BFloat16>};
const Register<RmsNorm> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                        {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
