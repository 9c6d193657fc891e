#pragma once
// Turns the sums of a tile's quantised tokens into outputs.
#include "pysparse/int8.h"
#include "simd/store.h"

namespace pysparse {
namespace {

// sums[vector][row]: scaled by the weight, not yet by the token.
[[maybe_unused]] void store_quantized(float (*sums)[kTileRows], int64_t tile,
                                      const QuantizedTokens& input, const OutputView& output,
                                      int64_t first_token) {
  for (int t = 0; t < input.tokens; ++t) {
    float* high = sums[t * input.parts];
    if (input.parts == 2)
      for (int r = 0; r < kTileRows; ++r) high[r] = 256.0f * high[r] + sums[2 * t + 1][r];
    for (int r = 0; r < kTileRows; ++r) high[r] *= input.scales[t];
    store_rows(high, tile * kTileRows, kTileRows, first_token + t, output);
  }
}

}  // namespace
}  // namespace pysparse
