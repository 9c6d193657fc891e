// y = W x for int8 weights in any n:m pattern and quantised tokens: the oracle of exact sums, and
// the kernel of the patterns that have no other.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/generic.h"
#include "pysparse/nm_slots.h"
#include "simd/quantize_token.h"
#include "simd/store_quantized.h"

namespace pysparse {
namespace {

constexpr int kMaxVectors = 16;

void run(const NmView& weight, const RowScales& scales, int64_t tile, const QuantizedTokens& input,
         const OutputView& output, int64_t first_token) {
  const NmLayout& layout = weight.layout;
  const int vectors = input.vectors();
  const int8_t* values = static_cast<const int8_t*>(weight.values) + tile * layout.tile_values();
  float rows[kMaxVectors][kTileRows] = {};
  for (int64_t r = 0; r < std::min(kTileRows, layout.rows - tile * kTileRows); ++r) {
    int32_t sums[kMaxVectors] = {};
    int64_t group = 0;
    const auto flush = [&] {
      for (int v = 0; v < vectors; ++v) {
        const int32_t whole = sums[v] - kInputZero * scales.sums_of(group, tile)[r];
        rows[v][r] += scales.scale_of(group, tile)[r] * static_cast<float>(whole);
        sums[v] = 0;
      }
    };
    for_each_slot(
        weight, tile, r, [](int64_t) { return true; },
        [&](int64_t col, int64_t place) {
          for (; group < col / scales.group_cols; ++group) flush();
          const InputPlace at = input_place(layout, col, vectors);
          for (int v = 0; v < vectors; ++v)
            sums[v] += values[place] * input.bytes[at.first + v * at.stride];
        });
    for (; group < scales.groups; ++group) flush();
  }
  store_quantized(rows, tile, input, output, first_token);
}

constexpr NmInt8Linear::Kernel kFloat32{quantize_token<float>, kMaxVectors, covers_all, run};
constexpr NmInt8Linear::Kernel kBFloat16{quantize_token<BFloat16>, kMaxVectors, covers_all, run};
const Register<NmInt8Linear> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                             {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace

const NmInt8Linear::Kernel& nm_int8_generic(DType dtype) {
  return dtype == DType::kFloat32 ? kFloat32 : kBFloat16;
}

}  // namespace pysparse
