// Weights that take the same activations in one call: check them all, pack the activations once,
// share the tiles of all weights out over the threads.
#include <algorithm>
#include <cstring>

#include "packed_input.h"
#include "pysparse/error.h"
#include "pysparse/fused.h"
#include "pysparse/kernel_table.h"
#include "pysparse/share.h"
#include "tiled_weight.h"

namespace pysparse {
namespace {

// The tiles of all weights in one row.
struct TileRow {
  const BitmapOperand* operands;
  int count;

  int64_t total() const {
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) tiles += operands[i].weight.tiles();
    return tiles;
  }
  int64_t bytes_before(int64_t tile) const {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) {
      const TiledBitmapView& weight = operands[i].weight;
      const int64_t inside = std::clamp<int64_t>(tile, 0, weight.tiles());
      bytes += pysparse::bytes_before(weight, inside);
      tile -= weight.tiles();
    }
    return bytes;
  }
};

void check_operands(const BitmapOperand* operands, int count) {
  check(count >= 1, "a group has at least one weight, got ", count);
  const TiledBitmapView& first = operands[0].weight;
  for (int i = 0; i < count; ++i) {
    check_sizes(operands[i].weight, operands[i].sizes);
    check(operands[i].weight.cols == first.cols && operands[i].weight.dtype == first.dtype,
          "weight ", i, " takes ", operands[i].weight.cols, " features of ",
          name(operands[i].weight.dtype), ", the first one ", first.cols, " of ",
          name(first.dtype));
  }
}

const void* at(const void* values, int64_t index, DType dtype) {
  return values ? static_cast<const char*>(values) + index * size_of(dtype) : nullptr;
}

// One tile as a weight of its own, so that a kernel writes its rows to a buffer for them alone.
TiledBitmapView tile_view(const TiledBitmapView& weight, int64_t tile) {
  return {weight.values,
          weight.masks + tile * weight.pairs(),
          weight.tile_offsets + tile,
          std::min(kTileRows, weight.rows - tile * kTileRows),
          weight.cols,
          weight.dtype};
}

constexpr int kGatedTokens = 16;  // at once; so many results of a tile lie side by side

struct TileResults {
  alignas(64) unsigned char values[kGatedTokens * kTileRows * sizeof(float)] = {};
};

// Both halves of one tile for the tokens of one chunk, and their gated product.
struct GatedTile {
  const BitmapLinear::Kernel& linear;
  const GatedProduct::Kernel& product;
  Activation activation;
  TileResults gate, up;

  void multiply(const BitmapOperand& operand, int64_t tile, const void* input, int tokens,
                TileResults& results) const {
    const TiledBitmapView one = tile_view(operand.weight, tile);
    const void* bias = at(operand.bias, tile * kTileRows, one.dtype);
    linear.run(one, 0, input, tokens, {results.values, bias, one.rows, one.dtype}, 0);
  }

  // y is the place of the tile's first row in the output of the chunk's first token.
  void store(int64_t tile_rows, int tokens, char* y, int64_t row_bytes, DType dtype) {
    const int64_t count = tokens * tile_rows;
    product.run(activation, gate.values, up.values,
                (count + GatedProduct::kLanes - 1) / GatedProduct::kLanes * GatedProduct::kLanes);
    const int64_t bytes = tile_rows * size_of(dtype);
    for (int t = 0; t < tokens; ++t)
      std::memcpy(y + t * row_bytes, gate.values + t * bytes, static_cast<size_t>(bytes));
  }
};

}  // namespace

void bitmap_linear_group(const BitmapOperand* operands, int count, const void* x, int64_t tokens,
                         void* const* outputs) {
  check_operands(operands, count);
  const TiledBitmapView& first = operands[0].weight;
  const auto& kernel = lookup<BitmapLinear>(first.dtype);
  Input input = input_for(kernel, first.dtype, x, tokens, first.cols);
  const TileRow row{operands, count};
  const auto bytes_before = [&](int64_t tile) { return row.bytes_before(tile); };
  const int64_t total = row.total();
  with_input(input, threads_for(bytes_before(total) * input.chunks()), [&](int thread, int team) {
    const Range share = share_by_bytes(total, bytes_before, thread, team);
    int64_t before = 0;
    for (int i = 0; i < count; ++i) {
      const BitmapOperand& operand = operands[i];
      const OutputView output{outputs[i], operand.bias, operand.weight.rows, first.dtype};
      const int64_t tiles = operand.weight.tiles();
      const int64_t end = std::min(share.end - before, tiles);
      for (int64_t tile = std::max<int64_t>(share.begin - before, 0); tile < end; ++tile)
        for (int64_t c = 0; c < input.chunks(); ++c)
          kernel.run(operand.weight, tile, input.chunk_data(c), input.tokens_in(c), output,
                     c * input.chunk);
      before += tiles;
    }
  });
}

void bitmap_gated_linear(const BitmapOperand& gate, const BitmapOperand& up, Activation activation,
                         const void* x, int64_t tokens, void* y) {
  const BitmapOperand both[] = {gate, up};
  check_operands(both, 2);
  const int64_t rows = gate.weight.rows;
  check(up.weight.rows == rows, "gate has ", rows, " rows, up ", up.weight.rows,
        ": they are multiplied row by row");
  const DType dtype = gate.weight.dtype;
  const auto& kernel = lookup<BitmapLinear>(dtype);
  const auto& product = lookup<GatedProduct>(dtype);
  Input input = input_for(kernel, dtype, x, tokens, gate.weight.cols);
  input.chunk = std::min(input.chunk, kGatedTokens);
  const auto bytes_before = [&](int64_t tile) {
    return pysparse::bytes_before(gate.weight, tile) + pysparse::bytes_before(up.weight, tile);
  };
  const int64_t tiles = gate.weight.tiles(), row_bytes = rows * size_of(dtype);
  with_input(input, threads_for(bytes_before(tiles) * input.chunks()), [&](int thread, int team) {
    const Range share = share_by_bytes(tiles, bytes_before, thread, team);
    GatedTile work{kernel, product, activation, {}, {}};
    for (int64_t tile = share.begin; tile < share.end; ++tile)
      for (int64_t c = 0; c < input.chunks(); ++c) {
        const int count = input.tokens_in(c);
        work.multiply(gate, tile, input.chunk_data(c), count, work.gate);
        work.multiply(up, tile, input.chunk_data(c), count, work.up);
        work.store(
            std::min(kTileRows, rows - tile * kTileRows), count,
            static_cast<char*>(y) + c * input.chunk * row_bytes + tile * kTileRows * size_of(dtype),
            row_bytes, dtype);
      }
  });
}

}  // namespace pysparse
