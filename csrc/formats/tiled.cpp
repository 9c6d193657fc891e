// Row-major bitmap <-> tiles of 16 rows x pairs of columns (views.h), one tile at a time.
#include <array>
#include <atomic>

#include "bits.h"
#include "pysparse/formats.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

// Fills the mask words of one tile from 16 row masks, 32 pairs (64 columns) at a time.
void tile_masks(const BitmapView& map, int64_t tile, uint32_t* masks) {
  const int64_t bytes = mask_bytes(map.cols), pairs = (map.cols + 1) / 2;
  const int64_t rows = std::min(kTileRows, map.rows - tile * kTileRows);
  std::fill(masks, masks + pairs, 0u);
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = map.bitmask + (tile * kTileRows + r) * bytes;
    for (int64_t w = 0; 8 * w < bytes; ++w) {
      const uint64_t word = mask_word(row, bytes, w);
      const int64_t cells = std::min<int64_t>(32, pairs - 32 * w);
      for (int64_t i = 0; i < cells; ++i)
        masks[32 * w + i] |= static_cast<uint32_t>(word >> (2 * i) & 3u) << (2 * r);
    }
  }
}

// Throws unless the masks of a tile count what its offsets say and stay inside the matrix.
void check_tile(const uint32_t* masks, int64_t pairs, int64_t tile, int64_t rows, int64_t cols,
                const int64_t* tile_offsets) {
  const int64_t live = std::min(kTileRows, rows - tile * kTileRows);
  const uint32_t outside_rows = live == kTileRows ? 0u : ~0u << (2 * live);
  const uint32_t outside_cols = cols % 2 ? 0xaaaaaaaau : 0u;  // the odd half of the last pair
  int64_t count = 0;
  for (int64_t p = 0; p < pairs; ++p) {
    const uint32_t outside = outside_rows | (p + 1 == pairs ? outside_cols : 0u);
    check((masks[p] & outside) == 0, "tile ", tile, ", pair ", p, " has bits outside the ", rows,
          " x ", cols, " matrix");
    count += __builtin_popcount(masks[p]);
  }
  check(tile_offsets[tile + 1] - tile_offsets[tile] == count, "tile ", tile, " keeps ", count,
        " values, its offsets say ", tile_offsets[tile + 1] - tile_offsets[tile]);
}

}  // namespace

void tile_pack(const void* values, int64_t word, const BitmapView& map, int64_t nnz,
               void* tiled_values, uint32_t* masks, int64_t* tile_offsets) {
  bitmap_validate(map, nnz);
  const int64_t tiles = (map.rows + kTileRows - 1) / kTileRows, pairs = (map.cols + 1) / 2;
  // Tiles are whole rows, so a tile's values start where its first row's do.
  for (int64_t t = 0; t < tiles; ++t) tile_offsets[t] = map.row_offsets[t * kTileRows];
  tile_offsets[tiles] = nnz;
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(tiles, map.rows * map.cols, [&](int64_t t) {
      tile_masks(map, t, masks + t * pairs);
      std::array<const Word*, kTileRows> next{};
      const int64_t rows = std::min(kTileRows, map.rows - t * kTileRows);
      for (int64_t r = 0; r < rows; ++r)
        next[r] = static_cast<const Word*>(values) + map.row_offsets[t * kTileRows + r];
      Word* target = static_cast<Word*>(tiled_values) + tile_offsets[t];
      for (int64_t p = 0; p < pairs; ++p)
        for (uint32_t bits = masks[t * pairs + p]; bits; bits &= bits - 1)
          *target++ = *next[__builtin_ctz(bits) / 2]++;
    });
  });
}

void tile_unpack(const void* tiled_values, int64_t word, int64_t rows, int64_t cols,
                 const uint32_t* masks, const int64_t* tile_offsets, int64_t nnz, void* values,
                 uint8_t* bitmask, int64_t* row_offsets) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows, pairs = (cols + 1) / 2;
  const int64_t bytes = mask_bytes(cols);
  check(tile_offsets[0] == 0 && tile_offsets[tiles] == nnz, "tile_offsets run from ",
        tile_offsets[0], " to ", tile_offsets[tiles], ", expected 0 to ", nnz);
  for (int64_t t = 0; t < tiles; ++t)
    check_tile(masks + t * pairs, pairs, t, rows, cols, tile_offsets);
  std::fill(bitmask, bitmask + rows * bytes, uint8_t{0});
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(tiles, rows * cols, [&](int64_t t) {
      const uint32_t* cells = masks + t * pairs;
      std::array<int64_t, kTileRows> next{};
      for (int64_t p = 0; p < pairs; ++p)
        for (uint32_t bits = cells[p]; bits; bits &= bits - 1) ++next[__builtin_ctz(bits) / 2];
      const int64_t live = std::min(kTileRows, rows - t * kTileRows);
      int64_t total = tile_offsets[t];
      for (int64_t r = 0; r < live; ++r) {
        const int64_t count = next[r];
        next[r] = row_offsets[t * kTileRows + r] = total;
        total += count;
      }
      const Word* source = static_cast<const Word*>(tiled_values) + tile_offsets[t];
      for (int64_t p = 0; p < pairs; ++p) {
        for (uint32_t bits = cells[p]; bits; bits &= bits - 1) {
          const int bit = __builtin_ctz(bits), r = bit / 2;
          const int64_t col = 2 * p + bit % 2;
          static_cast<Word*>(values)[next[r]++] = *source++;
          bitmask[(t * kTileRows + r) * bytes + col / 8] |= static_cast<uint8_t>(1u << (col % 8));
        }
      }
    });
  });
}

}  // namespace pysparse
