// Philox words one block at a time, and Fisher-Yates partners from them: the oracle.
#include <algorithm>

#include "isa/generic.h"
#include "pysparse/shapley_draw.h"

namespace pysparse {
namespace {

void words(const Stream& stream, int64_t count, uint32_t* out) {
  for (int64_t at = 0; at < count; at += 4) {
    uint32_t x[4] = {stream.low(), stream.high(), stream.purpose, static_cast<uint32_t>(at / 4)};
    philox(stream.key, x);
    std::copy(x, x + 4, out + at);
  }
}

void partners(const Stream& stream, int64_t players, uint32_t* partner) {
  words(stream, players, partner);
  const auto n = static_cast<uint32_t>(players);
  for (uint32_t i = 0; i < n; ++i) partner[i] = i + uniform_below(stream, partner[i], i, n - i);
}

constexpr ShapleyDraw::Kernel kKernel{words, partners};
const Register<ShapleyDraw> registered{DType::kFloat32, isa::kGeneric, kKernel};

}  // namespace
}  // namespace pysparse
