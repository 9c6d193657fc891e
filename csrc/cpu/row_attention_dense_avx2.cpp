// softmax(scale q k^T) v of single rows on 8 lanes, all in float32.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "isa/avx2.h"
#include "pysparse/row_attention.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/floats_avx2.h"
#include "simd/row_heads.h"
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr RowAttention::Kernel kFloat32{attend_rows<Floats256, float>};
constexpr RowAttention::Kernel kBFloat16{attend_rows<Floats256, BFloat16>};
const Register<RowAttention> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                             {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
