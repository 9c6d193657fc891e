#pragma once
// Products with int8 weights. A weight is q * scale, one scale per row and group of columns; a
// token is quantised when it arrives, so that all products are of whole numbers and exact:
//   y[row] = token_scale * sum over groups of scale * (sum q * u - 128 * sum q),  u = byte + 128.
#include "pysparse/kernel_table.h"
#include "pysparse/views.h"

namespace pysparse {

// No 32-bit sum can overflow: 65536 columns x 255 x 127 = 2 122 383 360 < 2^31.
inline constexpr int64_t kMaxInt8Cols = 65536;
inline constexpr int64_t kQuadCols = 4;      // of a cell: 16 rows x 4 columns fill 512 bits
inline constexpr int64_t kBytePadding = 64;  // int8 values that a full load past the last may touch
inline constexpr int kInputZero = 128;       // what stands for zero in a quantised token

struct RowScales {
  const float* scales;      // [groups][padded_rows]
  const int32_t* row_sums;  // [groups][padded_rows]: the sums of a row's q, which the offset costs
  int64_t groups, group_cols, padded_rows;  // padded_rows: tiles * 16

  const float* scale_of(int64_t group, int64_t tile) const {
    return scales + group * padded_rows + tile * kTileRows;
  }
  const int32_t* sums_of(int64_t group, int64_t tile) const {
    return row_sums + group * padded_rows + tile * kTileRows;
  }
};

// Tiles of 16 rows, streamed along quads of columns: bit 4 * r + c of masks[t * quads + q] says
// that weight (16 t + r, 4 q + c) is stored; values follow in bit order, padded by kBytePadding.
struct TiledInt8View {
  const int8_t* values;
  const uint64_t* masks;        // [tiles][quads]
  const int64_t* tile_offsets;  // [tiles + 1]
  RowScales scales;
  int64_t rows, cols;

  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t quads() const { return (cols + kQuadCols - 1) / kQuadCols; }
};

// Some quantised tokens: bytes[block][vector][width], the width being the format's. A token is one
// vector of q + 128, or two where 8 bits are too coarse: q = 256 * high + low, each + 128.
struct QuantizedTokens {
  const uint8_t* bytes;
  const float* scales;  // [tokens]; NaN where a token holds a NaN or an infinity
  int tokens, parts;

  int vectors() const { return tokens * parts; }
};

// Quantises the `cols` values of one token: writes `parts` rows of bytes, returns the scale.
using QuantizeToken = float (*)(const void* x, int64_t cols, int parts, uint8_t* high,
                                uint8_t* low);

struct Int8BitmapLinear {
  static constexpr const char* op = "linear";
  static constexpr const char* format = "bitmap-int8";  // dtype: of the activations
  struct Kernel {
    QuantizeToken quantize;
    int max_vectors;  // per call, at least 2
    // Writes rows [16 tile, 16 tile + 16) of the tokens' outputs.
    void (*run)(const TiledInt8View& weight, int64_t tile, const QuantizedTokens& input,
                const OutputView& output, int64_t first_token);
  };
};

struct Int8BitmapUnpack {
  static constexpr const char* op = "unpack";
  static constexpr const char* format = "bitmap-int8";  // dtype: of the dense rows
  struct Kernel {
    int64_t group_multiple;  // of columns that a scale covers, where a row has several
    // Writes the rows of one tile, `rows` of them (16 but at the end), at dense[row * cols].
    void (*run)(const TiledInt8View& weight, int64_t tile, int64_t rows, void* dense);
  };
};
// The generic kernel, which takes every group.
const Int8BitmapUnpack::Kernel& int8_unpack_generic(DType dtype);

// The best kernel for a group of columns.
template <class Op>
const typename Op::Kernel& unpack_kernel(const RowScales& scales, DType dtype,
                                         const typename Op::Kernel& otherwise) {
  const auto& best = lookup<Op>(dtype);
  return scales.groups == 1 || scales.group_cols % best.group_multiple == 0 ? best : otherwise;
}

struct Int8Sizes {
  int64_t values, masks, tile_offsets, scales, row_sums;
};

void check_scales(const RowScales& scales, int64_t cols, int64_t tiles, int64_t scale_count,
                  int64_t sum_count);
void int8_linear(const TiledInt8View& weight, const Int8Sizes& sizes, const void* x, int64_t tokens,
                 int parts, const OutputView& output);
// Writes rows of the dequantised weight, `rows` of them from a tile's first on, at dense[row *
// cols].
void int8_unpack(const TiledInt8View& weight, const Int8Sizes& sizes, int64_t first_tile,
                 int64_t rows, DType dtype, void* dense);

// Row-major values to int8: scale = largest magnitude / 127 of a row's group, ties to even. A group
// of zeros, or of values too small for a scale, gets scale 0 and zeros. scales: [rows][groups],
// read where they are given and else written.
void int8_quantize(const float* values, const BitmapView& map, int64_t nnz, int64_t group_cols,
                   bool scales_given, int8_t* quantized, float* scales);
void int8_dequantize(const int8_t* quantized, const float* scales, const BitmapView& map,
                     int64_t nnz, int64_t group_cols, float* values);
// Outputs as in TiledInt8View; row_sums as in RowScales.
void int8_tile_pack(const int8_t* values, const BitmapView& map, int64_t nnz, int64_t group_cols,
                    int8_t* tiled, uint64_t* masks, int64_t* tile_offsets, int32_t* row_sums);
void int8_tile_unpack(const int8_t* tiled, int64_t rows, int64_t cols, const uint64_t* masks,
                      const int64_t* tile_offsets, int64_t nnz, int8_t* values, uint8_t* bitmask,
                      int64_t* row_offsets);

}  // namespace pysparse
