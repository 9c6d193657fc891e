#pragma once
// Pointers and sizes, no ownership. Whoever builds a view has checked it; kernels trust it.
#include <cstdint>

#include "pysparse/dtype.h"

namespace pysparse {

inline constexpr int64_t kTileRows = 16;      // fp32 lanes of a 512-bit accumulator
inline constexpr int64_t kValuePadding = 32;  // bf16 lanes of a 512-bit load past the last value

// Row-major bitmap, as on disk: column j of a row is bit j % 8 of byte j / 8.
struct BitmapView {
  const uint8_t* bitmask;      // [rows][mask_bytes(cols)]
  const int64_t* row_offsets;  // [rows], exclusive prefix sum of the rows' counts
  int64_t rows, cols;
};

constexpr int64_t mask_bytes(int64_t cols) { return (cols + 7) / 8; }

// Tiles of 16 rows, streamed along pairs of columns. Bit 2 * r + c of masks[t * pairs + p] says
// that weight (16 t + r, 2 p + c) is stored; values follow in bit order, padded by kValuePadding.
struct TiledBitmapView {
  const void* values;
  const uint32_t* masks;        // [tiles][pairs]
  const int64_t* tile_offsets;  // [tiles + 1]
  int64_t rows, cols;
  DType dtype;

  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t pairs() const { return (cols + 1) / 2; }
};

struct DenseView {
  const void* values;  // [rows][cols]
  int64_t rows, cols;
  DType dtype;
};

// y[token * rows + row] in the weight's dtype; bias may be null.
struct OutputView {
  void* values;
  const void* bias;
  int64_t rows;
  DType dtype;
};

}  // namespace pysparse
