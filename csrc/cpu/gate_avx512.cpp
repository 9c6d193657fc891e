// y = activation(gate) * up on 16 lanes.
#include <type_traits>

#include "isa/avx512.h"
#include "pysparse/fused.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/floats_avx512.h"
#include "simd/gate_vectors.h"
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr GatedProduct::Kernel kFloat32{gate_values<Floats512, float>};
constexpr GatedProduct::Kernel kBFloat16{gate_values<Floats512, BFloat16>};
const Register<GatedProduct> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                             {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
