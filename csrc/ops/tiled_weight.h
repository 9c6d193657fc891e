#pragma once
// What the operations on tiled bitmaps ask of a weight: do its buffers fit its shape, how many
// bytes do its tiles take.
#include "pysparse/error.h"
#include "pysparse/linear.h"

namespace pysparse {

inline void check_sizes(const TiledBitmapView& weight, const BufferSizes& sizes) {
  check(weight.rows >= 0 && weight.cols >= 0, "negative shape ", weight.rows, " x ", weight.cols);
  check(sizes.masks == weight.tiles() * weight.pairs(), "masks hold ", sizes.masks, " words, a ",
        weight.rows, " x ", weight.cols, " weight has ", weight.tiles() * weight.pairs());
  check(sizes.tile_offsets == weight.tiles() + 1, "tile_offsets hold ", sizes.tile_offsets,
        " entries, expected ", weight.tiles() + 1);
  const int64_t total = weight.tile_offsets[weight.tiles()];
  check(total >= 0 && total + kValuePadding <= sizes.values, "tile_offsets end at ", total,
        ", but only ", sizes.values, " values are there, ", kValuePadding, " of them padding");
}

// Bytes of values and masks in the tiles before `tile`.
inline int64_t bytes_before(const TiledBitmapView& weight, int64_t tile) {
  return weight.tile_offsets[tile] * size_of(weight.dtype) + tile * weight.pairs() * 4;
}

}  // namespace pysparse
