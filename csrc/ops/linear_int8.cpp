// Linear layers with int8 weights under a bitmap: check, quantise the activations, split the tiles.
#include "pysparse/error.h"
#include "pysparse/share.h"
#include "quantized_input.h"
#include "tiled_int8.h"

namespace pysparse {
void check_scales(const RowScales& scales, int64_t cols, int64_t tiles, int64_t scale_count,
                  int64_t sum_count) {
  check(cols <= kMaxInt8Cols, cols, " columns: beyond ", kMaxInt8Cols,
        " a 32-bit sum of int8 products could overflow; use bfloat16 values");
  check(scales.group_cols > 0, "a scale covers at least one column, got ", scales.group_cols);
  const int64_t groups = std::max<int64_t>(1, (cols + scales.group_cols - 1) / scales.group_cols);
  check(scales.groups == groups && scales.padded_rows == tiles * kTileRows &&
            scale_count == groups * scales.padded_rows && sum_count == scale_count,
        "scales and row_sums hold ", scale_count, " and ", sum_count, " entries, expected ", groups,
        " x ", tiles * kTileRows);
}

void int8_linear(const TiledInt8View& weight, const Int8Sizes& sizes, const void* x, int64_t tokens,
                 int parts, const OutputView& output) {
  check_sizes(weight, sizes);
  check(parts == 1 || parts == 2, "activations have 1 or 2 bytes, got ", parts);
  const auto& kernel = lookup<Int8BitmapLinear>(output.dtype);
  const BlockLayout layout{weight.cols, weight.cols, kQuadCols, weight.quads(), kQuadCols, 0};
  const QuantizedInput input(x, output.dtype, tokens, parts, layout, kernel.quantize,
                             kernel.max_vectors);
  const auto before_tile = [&](int64_t tile) { return bytes_before(weight, tile); };
  const int64_t bytes = before_tile(weight.tiles()) * input.chunks();
  with_prepared(input, threads_for(bytes), [&](int thread, int threads) {
    const Range tiles = share_by_bytes(weight.tiles(), before_tile, thread, threads);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
      for (int64_t c = 0; c < input.chunks(); ++c)  // the tile's weights stay in cache
        kernel.run(weight, tile, input.chunk(c), output, input.first_token(c));
  });
}

void int8_unpack(const TiledInt8View& weight, const Int8Sizes& sizes, int64_t first_tile,
                 int64_t rows, DType dtype, void* dense) {
  check_sizes(weight, sizes);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  check(first_tile >= 0 && rows >= 0 && first_tile + tiles <= weight.tiles(), "tiles [", first_tile,
        ", +", tiles, ") of a weight with ", weight.tiles());
  const auto& kernel =
      unpack_kernel<Int8BitmapUnpack>(weight.scales, dtype, int8_unpack_generic(dtype));
  const int64_t tile_bytes = kTileRows * weight.cols * size_of(dtype);
  parallel_for(tiles, tiles * tile_bytes, [&](int64_t i) {
    kernel.run(weight, first_tile + i, std::min(kTileRows, rows - i * kTileRows),
               static_cast<char*>(dense) + i * tile_bytes);
  });
}

}  // namespace pysparse
