// y = W x for int8 weights and quantised tokens, tile by tile: the oracle of the vector kernels.
// Sums of whole numbers are exact, so every level must find the same ones.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/generic.h"
#include "pysparse/int8.h"
#include "simd/quantize_token.h"
#include "simd/store_quantized.h"

namespace pysparse {
namespace {

constexpr int kMaxVectors = 16;

void run(const TiledInt8View& weight, int64_t tile, const QuantizedTokens& input,
         const OutputView& output, int64_t first_token) {
  const int vectors = input.vectors();
  const int64_t group_quads = weight.scales.group_cols / kQuadCols;
  const int8_t* next = weight.values + weight.tile_offsets[tile];
  const uint64_t* masks = weight.masks + tile * weight.quads();
  float rows[kMaxVectors][kTileRows] = {};
  for (int64_t g = 0; g < weight.scales.groups; ++g) {
    int32_t sums[kMaxVectors][kTileRows] = {};
    const int64_t end = g + 1 == weight.scales.groups ? weight.quads() : (g + 1) * group_quads;
    for (int64_t q = g * group_quads; q < end; ++q) {
      for (uint64_t bits = masks[q]; bits; bits &= bits - 1) {
        const int bit = __builtin_ctzll(bits);
        const int w = *next++;
        for (int v = 0; v < vectors; ++v)
          sums[v][bit / 4] += w * input.bytes[(q * vectors + v) * kQuadCols + bit % 4];
      }
    }
    const float* scales = weight.scales.scale_of(g, tile);
    const int32_t* row_sums = weight.scales.sums_of(g, tile);
    for (int v = 0; v < vectors; ++v)
      for (int r = 0; r < kTileRows; ++r)
        rows[v][r] += scales[r] * static_cast<float>(sums[v][r] - kInputZero * row_sums[r]);
  }
  store_quantized(rows, tile, input, output, first_token);
}

constexpr Int8BitmapLinear::Kernel kFloat32{quantize_token<float>, kMaxVectors, run};
constexpr Int8BitmapLinear::Kernel kBFloat16{quantize_token<BFloat16>, kMaxVectors, run};
const Register<Int8BitmapLinear> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                                 {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
