// Rotary position embedding on 8 lanes.
#include <algorithm>
#include <type_traits>

#include "isa/avx2.h"
#include "pysparse/rotary.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/floats_avx2.h"
#include "simd/rotary_heads.h"
namespace pysparse {
namespace {

struct Vectors : Floats256 {
  static Float apart(Float v) {
    asm("" : "+x"(v));
    return v;
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr Rotary::Kernel kFloat32{rotate_heads<Vectors, float>};
constexpr Rotary::Kernel kBFloat16{rotate_heads<Vectors, BFloat16>};
const Register<Rotary> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                       {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
