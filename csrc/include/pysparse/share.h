#pragma once
// Splits tiles of unequal size over threads.
#include "pysparse/parallel.h"

namespace pysparse {

// The tiles that are `thread`'s share by bytes; bytes_before(tile) counts those of the tiles
// before.
template <class BytesBefore>
Range share_by_bytes(int64_t tiles, const BytesBefore& bytes_before, int thread, int threads) {
  const auto first_tile_at = [&](int part) {
    const int64_t wanted = bytes_before(tiles) / threads * part;
    int64_t low = 0, high = tiles;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (bytes_before(middle) < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  return {thread == 0 ? 0 : first_tile_at(thread),
          thread + 1 == threads ? tiles : first_tile_at(thread + 1)};
}

}  // namespace pysparse
