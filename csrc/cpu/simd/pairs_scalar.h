#pragma once
// The parts of a pair kernel that plain loops serve: transposing activations to fp32, writing sums.
#include <cmath>
#include <cstdint>

#include "pysparse/views.h"
#include "simd/store.h"

namespace pysparse {
namespace {

// See PairsLinear::Kernel::transpose; tokens keep their order.
template <class T>
[[maybe_unused]] bool transpose_scalar(const void* x, int64_t cols, int tokens, int width,
                                       int64_t begin, int64_t end, void* input) {
  constexpr int64_t kBlock = 16;  // columns, whose lines stay in the cache from token to token
  bool finite = true;
  float* out = static_cast<float*>(input);
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = block + kBlock < end ? block + kBlock : end;
    for (int t = 0; t < width; ++t)
      for (int64_t k = block; k < stop; ++k) {
        const float value = t < tokens ? to_float(static_cast<const T*>(x)[t * cols + k]) : 0.0f;
        finite &= std::isfinite(value);
        out[k * width + t] = value;
      }
  }
  return finite;
}

// Writes sums[row][width] of a block of rows to the outputs of its tokens.
[[maybe_unused]] void store_pairs(const float* sums, int64_t first_row, int64_t rows, int tokens,
                                  int width, const OutputView& output, int64_t first_token) {
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t live = rows - row < kTileRows ? rows - row : kTileRows;
    for (int t = 0; t < tokens; ++t) {
      float column[kTileRows];
      for (int64_t r = 0; r < live; ++r) column[r] = sums[(row + r) * width + t];
      store_rows(column, first_row + row, live, first_token + t, output);
    }
  }
}

}  // namespace
}  // namespace pysparse
