// y = W x, tile by tile, in double: the oracle that every other kernel is tested against.
#include "isa/generic.h"
#include "pysparse/linear.h"
#include "simd/store.h"

namespace pysparse {
namespace {

constexpr int kMaxTokens = 16;

template <class T>
void run(const TiledBitmapView& weight, int64_t tile, const void* input, int tokens,
         const OutputView& output, int64_t first_token) {
  const float* pairs = static_cast<const float*>(input);
  const T* next = static_cast<const T*>(weight.values) + weight.tile_offsets[tile];
  const uint32_t* masks = weight.masks + tile * weight.pairs();
  double sums[kMaxTokens][kTileRows] = {};
  for (int64_t p = 0; p < weight.pairs(); ++p) {
    // Zeros are multiplied too: a non-finite input then spreads exactly as in the dense product.
    for (int bit = 0; bit < 32; ++bit) {
      const double w = masks[p] >> bit & 1 ? to_float(*next++) : 0.0f;
      for (int t = 0; t < tokens; ++t)
        sums[t][bit / 2] += w * pairs[2 * (p * tokens + t) + bit % 2];
    }
  }
  for (int t = 0; t < tokens; ++t) {
    float rounded[kTileRows];
    for (int r = 0; r < kTileRows; ++r) rounded[r] = static_cast<float>(sums[t][r]);
    store_rows(rounded, tile * kTileRows, kTileRows, first_token + t, output);
  }
}

constexpr BitmapLinear::Kernel kFloat32{{DType::kFloat32, 2}, kMaxTokens, run<float>};
constexpr BitmapLinear::Kernel kBFloat16{{DType::kFloat32, 2}, kMaxTokens, run<BFloat16>};
const Register<BitmapLinear> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                             {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
