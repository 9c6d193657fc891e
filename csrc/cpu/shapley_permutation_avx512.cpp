// Philox words and Fisher-Yates partners, sixteen blocks at a time.
#include "isa/avx512.h"
#include "pysparse/shapley_draw.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/philox_avx512.h"
namespace pysparse {
namespace {

void words(const Stream& stream, int64_t count, uint32_t* out) {
  for (int64_t at = 0; at < count; at += ShapleyDraw::kGroup) {
    __m512i group[4];
    philox_group(stream, static_cast<uint32_t>(at / 4), group);
    for (int r = 0; r < 4; ++r) _mm512_storeu_si512(out + at + 16 * r, group[r]);
  }
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ShapleyDraw::Kernel kKernel{words, draw_partners};
const Register<ShapleyDraw> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
