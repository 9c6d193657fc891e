// Rotary position embedding on 16 lanes.
#include <type_traits>

#include "isa/avx512.h"
#include "pysparse/rotary.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/floats_avx512.h"
#include "simd/rotary_heads.h"
namespace pysparse {
namespace {

struct Vectors : Floats512 {
  static Float apart(Float v) {
    asm("" : "+v"(v));
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
const Register<Rotary> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                       {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
