// Int8 weights that take the same activations in one call: the activations are quantised once, the
// tiles of all weights shared out over the threads. See linear_fused.cpp.
#include "fused_tiles.h"
#include "pysparse/error.h"
#include "quantized_input.h"
#include "tiled_int8.h"

namespace pysparse {
namespace {

void check_operands(const Int8Operand* operands, int count, int parts) {
  check(count >= 1, "a group has at least one weight, got ", count);
  check(parts == 1 || parts == 2, "activations have 1 or 2 bytes, got ", parts);
  for (int i = 0; i < count; ++i) {
    check_sizes(operands[i].weight, operands[i].sizes);
    check(operands[i].weight.cols == operands[0].weight.cols, "weight ", i, " takes ",
          operands[i].weight.cols, " features, the first one ", operands[0].weight.cols);
  }
}

BlockLayout layout_of(const TiledInt8View& weight) {
  return {weight.cols, weight.cols, kQuadCols, weight.quads(), kQuadCols, 0};
}

// One tile as a weight of its own, so that a kernel writes its rows to a buffer for them alone.
TiledInt8View tile_view(const TiledInt8View& weight, int64_t tile) {
  TiledInt8View one = weight;
  one.masks += tile * weight.quads();
  one.tile_offsets += tile;
  one.scales.scales += tile * kTileRows;
  one.scales.row_sums += tile * kTileRows;
  one.rows = std::min(kTileRows, weight.rows - tile * kTileRows);
  return one;
}

}  // namespace

void int8_linear_group(const Int8Operand* operands, int count, const QuantizedCall& call,
                       void* const* outputs) {
  check_operands(operands, count, call.parts);
  const auto& kernel = lookup<Int8BitmapLinear>(call.dtype);
  const QuantizedInput input(call.x, call.dtype, call.tokens, call.parts,
                             layout_of(operands[0].weight), kernel.quantize, kernel.max_vectors);
  const TileRow<Int8Operand> row{operands, count};
  with_prepared(input, threads_for(row.bytes() * input.chunks()), [&](int thread, int team) {
    row.run_share(thread, team, [&](int i, int64_t tile) {
      const Int8Operand& operand = operands[i];
      const OutputView output{outputs[i], operand.bias, operand.weight.rows, call.dtype};
      for (int64_t c = 0; c < input.chunks(); ++c)
        kernel.run(operand.weight, tile, input.chunk(c), output, input.first_token(c));
    });
  });
}

void int8_gated_linear(const Int8Operand& gate, const Int8Operand& up, Activation activation,
                       const QuantizedCall& call, void* y) {
  const Int8Operand both[] = {gate, up};
  check_operands(both, 2, call.parts);
  check_gated_rows(gate.weight.rows, up.weight.rows);
  const auto& kernel = lookup<Int8BitmapLinear>(call.dtype);
  const QuantizedInput input(call.x, call.dtype, call.tokens, call.parts, layout_of(gate.weight),
                             kernel.quantize,
                             std::min(kernel.max_vectors, kGatedTokens * call.parts));
  const GatedOutput output{lookup<GatedProduct>(call.dtype), activation, static_cast<char*>(y),
                           gate.weight.rows, call.dtype};
  const auto before_tile = [&](int64_t tile) {
    return bytes_before(gate.weight, tile) + bytes_before(up.weight, tile);
  };
  const int64_t tiles = gate.weight.tiles();
  const auto multiply = [&](const Int8Operand& operand, int64_t tile, int64_t c,
                            TileResults& results) {
    kernel.run(tile_view(operand.weight, tile), 0, input.chunk(c),
               tile_output(operand, tile, results, call.dtype), 0);
  };
  with_prepared(input, threads_for(before_tile(tiles) * input.chunks()), [&](int thread, int team) {
    run_gated(both, input, output, share_by_bytes(tiles, before_tile, thread, team), multiply);
  });
}

}  // namespace pysparse
