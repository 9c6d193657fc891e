// softmax(scale q k^T) v of single rows on 16 lanes, all in float32.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "isa/avx512.h"
#include "pysparse/row_attention.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/floats_avx512.h"
#include "simd/row_heads.h"
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr RowAttention::Kernel kFloat32{attend_rows<Floats512, float>};
constexpr RowAttention::Kernel kBFloat16{attend_rows<Floats512, BFloat16>};
const Register<RowAttention> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                             {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
