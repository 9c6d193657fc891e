// Philox words and Fisher-Yates partners, eight blocks at a time.
#include "isa/avx512.h"
#include "pysparse/shapley_draw.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/philox_avx512.h"
namespace pysparse {
namespace {

void words(const Stream& stream, int64_t count, uint32_t* out) {
  for (int64_t at = 0; at < count; at += 32)
    philox_words(stream, static_cast<uint32_t>(at / 4), out + at);
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
