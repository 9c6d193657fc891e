#pragma once
// Several weights under one input: their tiles in one row that threads share out, and the gated
// product of two weights, whose tiles meet in the first-level cache. What differs between packings
// is a weight's bytes_before and the call of its kernel, which the including file passes.
#include <algorithm>
#include <cstring>

#include "pysparse/error.h"
#include "pysparse/fused.h"
#include "pysparse/kernel_table.h"
#include "pysparse/share.h"

namespace pysparse {

// The tiles of all weights in one row.
template <class Operand>
struct TileRow {
  const Operand* operands;
  int count;

  int64_t total() const {
    int64_t tiles = 0;
    for (int i = 0; i < count; ++i) tiles += operands[i].weight.tiles();
    return tiles;
  }
  int64_t bytes() const { return bytes_to(total()); }
  int64_t bytes_to(int64_t tile) const {
    int64_t bytes = 0;
    for (int i = 0; i < count; ++i) {
      const auto& weight = operands[i].weight;
      bytes += bytes_before(weight, std::clamp<int64_t>(tile, 0, weight.tiles()));
      tile -= weight.tiles();
    }
    return bytes;
  }
  // Calls run(index of the weight, tile of it) for one thread's share of the bytes.
  template <class Run>
  void run_share(int thread, int team, const Run& run) const {
    const auto before_tile = [&](int64_t tile) { return bytes_to(tile); };
    const Range share = share_by_bytes(total(), before_tile, thread, team);
    int64_t before = 0;
    for (int i = 0; i < count; ++i) {
      const int64_t tiles = operands[i].weight.tiles();
      const int64_t end = std::min(share.end - before, tiles);
      for (int64_t tile = std::max<int64_t>(share.begin - before, 0); tile < end; ++tile)
        run(i, tile);
      before += tiles;
    }
  }
};

constexpr int kGatedTokens = 16;  // at once; so many results of a tile lie side by side
// Tiles of one weight before it is the other's turn: the streams from memory are changed seldom.
constexpr int64_t kGatedTiles = 8;

struct TileResults {
  alignas(64) unsigned char values[kGatedTokens * kTileRows * sizeof(float)] = {};
};

// A buffer for the rows of one tile, as a kernel writes them: bias and rows of that tile alone.
template <class Operand>
OutputView tile_output(const Operand& operand, int64_t tile, TileResults& results, DType dtype) {
  const auto* bias = static_cast<const char*>(operand.bias);
  return {results.values, bias ? bias + tile * kTileRows * size_of(dtype) : nullptr,
          std::min(kTileRows, operand.weight.rows - tile * kTileRows), dtype};
}

// Where the gated products of a call go: y is [tokens][rows].
struct GatedOutput {
  const GatedProduct::Kernel& product;
  Activation activation;
  char* y;
  int64_t rows;
  DType dtype;

  // Multiplies one tile's halves and writes them for `tokens` tokens from first_token on.
  void store(TileResults& gate, const TileResults& up, int64_t tile, int tokens,
             int64_t first_token) const {
    const int64_t tile_rows = std::min(kTileRows, rows - tile * kTileRows);
    const int64_t count = tokens * tile_rows, bytes = tile_rows * size_of(dtype);
    product.run(activation, gate.values, up.values,
                (count + GatedProduct::kLanes - 1) / GatedProduct::kLanes * GatedProduct::kLanes);
    for (int t = 0; t < tokens; ++t)
      std::memcpy(y + ((first_token + t) * rows + tile * kTileRows) * size_of(dtype),
                  gate.values + t * bytes, static_cast<size_t>(bytes));
  }
};

// One thread's share of a gated product. multiply(operand, tile, chunk, results) writes a weight's
// rows of one tile for the tokens of one chunk, of kGatedTokens at most. With several chunks a
// tile's weights stay in the cache from one to the next.
template <class Operand, class Input, class Multiply>
void run_gated(const Operand (&both)[2], const Input& input, const GatedOutput& output, Range tiles,
               const Multiply& multiply) {
  TileResults gate[kGatedTiles], up[kGatedTiles];
  const int64_t step = input.chunks() == 1 ? kGatedTiles : 1;
  for (int64_t first = tiles.begin; first < tiles.end; first += step) {
    const int64_t end = std::min(first + step, tiles.end);
    for (int64_t c = 0; c < input.chunks(); ++c) {
      for (int64_t tile = first; tile < end; ++tile) multiply(both[0], tile, c, gate[tile - first]);
      for (int64_t tile = first; tile < end; ++tile) multiply(both[1], tile, c, up[tile - first]);
      for (int64_t tile = first; tile < end; ++tile)
        output.store(gate[tile - first], up[tile - first], tile, input.tokens_in(c),
                     input.first_token(c));
    }
  }
}

inline void check_gated_rows(int64_t gate, int64_t up) {
  check(up == gate, "gate has ", gate, " rows, up ", up, ": they are multiplied row by row");
}

}  // namespace pysparse
