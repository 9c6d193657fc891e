// Bitmaps that take the same activations in one call: check them all, pack the activations once,
// share the tiles of all weights out over the threads.
#include "fused_tiles.h"
#include "packed_input.h"
#include "pysparse/error.h"
#include "tiled_weight.h"

namespace pysparse {
namespace {

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

// One tile as a weight of its own, so that a kernel writes its rows to a buffer for them alone.
TiledBitmapView tile_view(const TiledBitmapView& weight, int64_t tile) {
  return {weight.values,
          weight.masks + tile * weight.pairs(),
          weight.tile_offsets + tile,
          std::min(kTileRows, weight.rows - tile * kTileRows),
          weight.cols,
          weight.dtype};
}

}  // namespace

void bitmap_linear_group(const BitmapOperand* operands, int count, const void* x, int64_t tokens,
                         void* const* outputs) {
  check_operands(operands, count);
  const TiledBitmapView& first = operands[0].weight;
  const auto& kernel = lookup<BitmapLinear>(first.dtype);
  Input input = input_for(kernel, first.dtype, x, tokens, first.cols);
  const TileRow<BitmapOperand> row{operands, count};
  with_input(input, threads_for(row.bytes() * input.chunks()), [&](int thread, int team) {
    row.run_share(thread, team, [&](int i, int64_t tile) {
      const BitmapOperand& operand = operands[i];
      const OutputView output{outputs[i], operand.bias, operand.weight.rows, first.dtype};
      for (int64_t c = 0; c < input.chunks(); ++c)
        kernel.run(operand.weight, tile, input.chunk_data(c), input.tokens_in(c), output,
                   input.first_token(c));
    });
  });
}

void bitmap_gated_linear(const BitmapOperand& gate, const BitmapOperand& up, Activation activation,
                         const void* x, int64_t tokens, void* y) {
  const BitmapOperand both[] = {gate, up};
  check_operands(both, 2);
  check_gated_rows(gate.weight.rows, up.weight.rows);
  const DType dtype = gate.weight.dtype;
  const auto& kernel = lookup<BitmapLinear>(dtype);
  Input input = input_for(kernel, dtype, x, tokens, gate.weight.cols);
  input.chunk = std::min(input.chunk, kGatedTokens);
  const GatedOutput output{lookup<GatedProduct>(dtype), activation, static_cast<char*>(y),
                           gate.weight.rows, dtype};
  const auto before_tile = [&](int64_t tile) {
    return bytes_before(gate.weight, tile) + bytes_before(up.weight, tile);
  };
  const int64_t tiles = gate.weight.tiles();
  const auto multiply = [&](const BitmapOperand& operand, int64_t tile, int64_t c,
                            TileResults& results) {
    kernel.run(tile_view(operand.weight, tile), 0, input.chunk_data(c), input.tokens_in(c),
               tile_output(operand, tile, results, dtype), 0);
  };
  with_input(input, threads_for(before_tile(tiles) * input.chunks()), [&](int thread, int team) {
    run_gated(both, input, output, share_by_bytes(tiles, before_tile, thread, team), multiply);
  });
}

}  // namespace pysparse
