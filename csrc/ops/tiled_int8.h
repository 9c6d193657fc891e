#pragma once
// What the operations on int8 tiles ask of a weight: do its buffers fit its shape, how many bytes
// do its tiles take.
#include "pysparse/error.h"
#include "pysparse/int8.h"

namespace pysparse {

inline void check_sizes(const TiledInt8View& weight, const Int8Sizes& sizes) {
  check(weight.rows >= 0 && weight.cols >= 0, "negative shape ", weight.rows, " x ", weight.cols);
  check(sizes.masks == weight.tiles() * weight.quads(), "masks hold ", sizes.masks, " words, a ",
        weight.rows, " x ", weight.cols, " weight has ", weight.tiles() * weight.quads());
  check(sizes.tile_offsets == weight.tiles() + 1, "tile_offsets hold ", sizes.tile_offsets,
        " entries, expected ", weight.tiles() + 1);
  const int64_t total = weight.tile_offsets[weight.tiles()];
  check(total >= 0 && total + kBytePadding <= sizes.values, "tile_offsets end at ", total,
        ", but only ", sizes.values, " values are there, ", kBytePadding, " of them padding");
  check_scales(weight.scales, weight.cols, weight.tiles(), sizes.scales, sizes.row_sums);
  check(weight.scales.groups == 1 || weight.scales.group_cols % kQuadCols == 0, "group of ",
        weight.scales.group_cols, " columns: it must be a multiple of ", kQuadCols);
}

// Bytes of values and masks in the tiles before `tile`.
inline int64_t bytes_before(const TiledInt8View& weight, int64_t tile) {
  return weight.tile_offsets[tile] + tile * weight.quads() * 8;
}

}  // namespace pysparse
