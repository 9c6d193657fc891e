// y = activation(gate) * up on 8 lanes.
#include <algorithm>
#include <type_traits>

#include "isa/avx2.h"
#include "pysparse/fused.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/floats_avx2.h"
#include "simd/gate_vectors.h"
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr GatedProduct::Kernel kFloat32{gate_values<Floats256, float>};
constexpr GatedProduct::Kernel kBFloat16{gate_values<Floats256, BFloat16>};
const Register<GatedProduct> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                             {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
