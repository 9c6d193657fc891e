// Linear layers: check the views, lay out the activations, split the rows over threads, call the
// kernels.
#include "pysparse/linear.h"

#include <algorithm>

#include "packed_input.h"
#include "pysparse/error.h"
#include "pysparse/kernel_table.h"
#include "pysparse/parallel.h"
#include "pysparse/share.h"
#include "tiled_weight.h"

namespace pysparse {
namespace {

// Tiles whose bytes (values and masks) are this thread's share of the whole.
Range byte_share(const TiledBitmapView& weight, int thread, int threads) {
  const auto before = [&](int64_t tile) { return bytes_before(weight, tile); };
  return share_by_bytes(weight.tiles(), before, thread, threads);
}

}  // namespace

void bitmap_linear(const TiledBitmapView& weight, const BufferSizes& sizes, const void* x,
                   int64_t tokens, const OutputView& output) {
  check_sizes(weight, sizes);
  const auto& kernel = lookup<BitmapLinear>(weight.dtype);
  Input input = input_for(kernel, weight.dtype, x, tokens, weight.cols);
  const int64_t bytes = bytes_before(weight, weight.tiles());
  with_input(input, threads_for(bytes * input.chunks()), [&](int thread, int threads) {
    const Range tiles = byte_share(weight, thread, threads);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile)
      for (int64_t c = 0; c < input.chunks();
           ++c)  // the tile's weights stay in cache from chunk to chunk
        kernel.run(weight, tile, input.chunk_data(c), input.tokens_in(c), output, c * input.chunk);
  });
}

void bitmap_unpack(const TiledBitmapView& weight, int64_t value_count, int64_t tile_count,
                   int64_t first_tile, int64_t rows, void* dense) {
  check(
      first_tile >= 0 && rows >= 0 && first_tile + (rows + kTileRows - 1) / kTileRows <= tile_count,
      "tiles [", first_tile, ", +", (rows + kTileRows - 1) / kTileRows, ") of a weight with ",
      tile_count);
  const int64_t total = weight.tile_offsets[tile_count];
  check(total >= 0 && total + kValuePadding <= value_count, "tile_offsets end at ", total,
        ", but only ", value_count, " values are there");
  const auto& kernel = lookup<BitmapUnpack>(weight.dtype);
  const int64_t tile_bytes = kTileRows * weight.cols * size_of(weight.dtype);
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  parallel_for(tiles, tiles * tile_bytes, [&](int64_t i) {
    kernel.run(weight, first_tile + i, std::min(kTileRows, rows - i * kTileRows),
               static_cast<char*>(dense) + i * tile_bytes);
  });
}

constexpr int64_t kRowBlock = 8;  // as many rows as a kernel takes at once for one token

void dense_linear(const DenseView& weight, const void* x, int64_t tokens,
                  const OutputView& output) {
  check(weight.rows >= 0 && weight.cols >= 0, "negative shape ", weight.rows, " x ", weight.cols);
  const auto& kernel = lookup<DenseLinear>(weight.dtype);
  Input input = input_for(kernel, weight.dtype, x, tokens, weight.cols);
  const int64_t bytes = weight.rows * weight.cols * size_of(weight.dtype);
  with_input(input, threads_for(bytes), [&](int thread, int threads) {
    const Range rows = even_share(weight.rows, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; row += kRowBlock)
      for (int64_t c = 0; c < input.chunks(); ++c)  // the rows stay in cache from chunk to chunk
        kernel.run(weight, row, std::min(row + kRowBlock, rows.end), input.chunk_data(c),
                   input.tokens_in(c), output, c * input.chunk);
  });
}

}  // namespace pysparse
