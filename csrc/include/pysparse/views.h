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

// Blocks of 256 rows x 256 columns (128 in fp32), for many tokens: as many columns as an 8-bit
// index reaches, and as the first-level cache holds for 64 tokens. Within a block the rows lie
// sorted by their count, four of them side by side, so that one loop serves four: entry 4 i + u of
// a group is pair i of its row u. An entry is two weights and their columns within the block,
// ascending; an odd last weight has its column twice and a zero beside it; a row shorter than its
// group ends in entries of columns (1, 0) and zeros. So every entry says by itself what is stored.
inline constexpr int64_t kPairRows = 256;
inline constexpr int64_t kPairCols = 256;  // at most
inline constexpr int64_t kPairGroup = 4;

struct PairsView {
  const void* values;            // [entries][2]
  const uint8_t* indices;        // [entries][2]
  const uint8_t* row_order;      // [row blocks][col blocks][slots], then kPairGroup of padding
  const uint8_t* counts;         // [row blocks][col blocks][slots / 4]: pairs of the longest row
  const int64_t* block_offsets;  // [row blocks * col blocks + 1], in entries
  int64_t rows, cols;
  DType dtype;

  int64_t row_blocks() const { return (rows + kPairRows - 1) / kPairRows; }
  int64_t block_cols() const { return dtype == DType::kFloat32 ? kPairCols / 2 : kPairCols; }
  int64_t col_blocks() const { return (cols + block_cols() - 1) / block_cols(); }
  int64_t rows_in(int64_t row_block) const {
    const int64_t left = rows - row_block * kPairRows;
    return left < kPairRows ? left : kPairRows;
  }
  // Rows of a block, rounded up to whole groups.
  int64_t slots(int64_t row_block) const {
    return (rows_in(row_block) + kPairGroup - 1) / kPairGroup * kPairGroup;
  }
  int64_t first_slot(int64_t row_block, int64_t col_block) const {
    return row_block * kPairRows * col_blocks() + col_block * slots(row_block);
  }
  int64_t total_slots() const {
    return (rows + kPairGroup - 1) / kPairGroup * kPairGroup * col_blocks();
  }
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
