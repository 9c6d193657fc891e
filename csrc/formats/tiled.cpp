// Row-major bitmap <-> tiles of 16 rows x cells of columns (views.h, int8.h), one tile at a time. A
// cell fills a 512-bit register: 2 columns under a 32-bit mask, 4 columns under a 64-bit one for
// bytes.
#include <array>
#include <atomic>

#include "bits.h"
#include "pysparse/formats.h"
#include "pysparse/int8.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

constexpr int64_t cells_of(int64_t cols, int cell_cols) {
  return (cols + cell_cols - 1) / cell_cols;
}

template <class Mask>
constexpr int kCellCols = static_cast<int>(sizeof(Mask) * 8 / kTileRows);

inline int lowest_bit(uint32_t mask) { return __builtin_ctz(mask); }
inline int lowest_bit(uint64_t mask) { return __builtin_ctzll(mask); }

// Fills the mask words of one tile from 16 row masks, 64 columns at a time.
template <class Mask>
void tile_masks(const BitmapView& map, int64_t tile, Mask* masks) {
  constexpr int kCols = kCellCols<Mask>, kPerWord = 64 / kCols;
  const int64_t bytes = mask_bytes(map.cols), cells = cells_of(map.cols, kCols);
  const int64_t rows = std::min(kTileRows, map.rows - tile * kTileRows);
  std::fill(masks, masks + cells, Mask{0});
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = map.bitmask + (tile * kTileRows + r) * bytes;
    for (int64_t w = 0; 8 * w < bytes; ++w) {
      const uint64_t word = mask_word(row, bytes, w);
      const int64_t count = std::min<int64_t>(kPerWord, cells - kPerWord * w);
      for (int64_t i = 0; i < count; ++i)
        masks[kPerWord * w + i] |= static_cast<Mask>(word >> (kCols * i) & ((1u << kCols) - 1))
                                   << (kCols * r);
    }
  }
}

// The bits that a cell may not have: rows past the matrix, and columns past it in the last cell.
template <class Mask>
Mask outside(int64_t live_rows, int64_t live_cols) {
  constexpr int kCols = kCellCols<Mask>;
  Mask bits = 0;
  for (int64_t r = 0; r < kTileRows; ++r)
    for (int64_t c = 0; c < kCols; ++c)
      if (r >= live_rows || c >= live_cols) bits |= Mask{1} << (kCols * r + c);
  return bits;
}

// Throws unless the masks of a tile count what its offsets say and stay inside the matrix.
template <class Mask>
void check_tile(const Mask* masks, int64_t tile, int64_t rows, int64_t cols,
                const int64_t* tile_offsets) {
  constexpr int kCols = kCellCols<Mask>;
  const int64_t cells = cells_of(cols, kCols), live = std::min(kTileRows, rows - tile * kTileRows);
  const Mask inner = outside<Mask>(live, kCols);
  const Mask last = outside<Mask>(live, cols - kCols * (cells - 1));
  int64_t count = 0;
  for (int64_t p = 0; p < cells; ++p) {
    check((masks[p] & (p + 1 == cells ? last : inner)) == 0, "tile ", tile,
          kCols == 2 ? ", pair " : ", quad ", p, " has bits outside the ", rows, " x ", cols,
          " matrix");
    count += __builtin_popcountll(masks[p]);
  }
  check(tile_offsets[tile + 1] - tile_offsets[tile] == count, "tile ", tile, " keeps ", count,
        " values, its offsets say ", tile_offsets[tile + 1] - tile_offsets[tile]);
}

template <class Word, class Mask>
void pack_tiles(const Word* values, const BitmapView& map, int64_t nnz, Word* tiled_values,
                Mask* masks, int64_t* tile_offsets) {
  constexpr int kCols = kCellCols<Mask>;
  const int64_t tiles = (map.rows + kTileRows - 1) / kTileRows, cells = cells_of(map.cols, kCols);
  // Tiles are whole rows, so a tile's values start where its first row's do.
  for (int64_t t = 0; t < tiles; ++t) tile_offsets[t] = map.row_offsets[t * kTileRows];
  tile_offsets[tiles] = nnz;
  parallel_for(tiles, map.rows * map.cols, [&](int64_t t) {
    tile_masks(map, t, masks + t * cells);
    std::array<const Word*, kTileRows> next{};
    const int64_t rows = std::min(kTileRows, map.rows - t * kTileRows);
    for (int64_t r = 0; r < rows; ++r) next[r] = values + map.row_offsets[t * kTileRows + r];
    Word* target = tiled_values + tile_offsets[t];
    for (int64_t p = 0; p < cells; ++p)
      for (Mask bits = masks[t * cells + p]; bits; bits &= bits - 1)
        *target++ = *next[lowest_bit(bits) / kCols]++;
  });
}

template <class Word, class Mask>
void unpack_tile(const Word* source, const Mask* masks, int64_t tile, int64_t rows, int64_t cols,
                 int64_t first_value, Word* values, uint8_t* bitmask, int64_t* row_offsets) {
  constexpr int kCols = kCellCols<Mask>;
  const int64_t cells = cells_of(cols, kCols), bytes = mask_bytes(cols);
  std::array<int64_t, kTileRows> next{};
  for (int64_t p = 0; p < cells; ++p)
    for (Mask bits = masks[p]; bits; bits &= bits - 1) ++next[lowest_bit(bits) / kCols];
  const int64_t live = std::min(kTileRows, rows - tile * kTileRows);
  int64_t total = first_value;
  for (int64_t r = 0; r < live; ++r) {
    const int64_t count = next[r];
    next[r] = row_offsets[tile * kTileRows + r] = total;
    total += count;
  }
  for (int64_t p = 0; p < cells; ++p) {
    for (Mask bits = masks[p]; bits; bits &= bits - 1) {
      const int bit = lowest_bit(bits), r = bit / kCols;
      const int64_t col = kCols * p + bit % kCols;
      values[next[r]++] = *source++;
      bitmask[(tile * kTileRows + r) * bytes + col / 8] |= static_cast<uint8_t>(1u << (col % 8));
    }
  }
}

template <class Word, class Mask>
void unpack_tiles(const Word* tiled_values, int64_t rows, int64_t cols, const Mask* masks,
                  const int64_t* tile_offsets, int64_t nnz, Word* values, uint8_t* bitmask,
                  int64_t* row_offsets) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  const int64_t cells = cells_of(cols, kCellCols<Mask>);
  check(tile_offsets[0] == 0 && tile_offsets[tiles] == nnz, "tile_offsets run from ",
        tile_offsets[0], " to ", tile_offsets[tiles], ", expected 0 to ", nnz);
  for (int64_t t = 0; t < tiles; ++t) check_tile(masks + t * cells, t, rows, cols, tile_offsets);
  std::fill(bitmask, bitmask + rows * mask_bytes(cols), uint8_t{0});
  parallel_for(tiles, rows * cols, [&](int64_t t) {
    unpack_tile(tiled_values + tile_offsets[t], masks + t * cells, t, rows, cols, tile_offsets[t],
                values, bitmask, row_offsets);
  });
}

}  // namespace

void tile_pack(const void* values, int64_t word, const BitmapView& map, int64_t nnz,
               void* tiled_values, uint32_t* masks, int64_t* tile_offsets) {
  bitmap_validate(map, nnz);
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    pack_tiles(static_cast<const Word*>(values), map, nnz, static_cast<Word*>(tiled_values), masks,
               tile_offsets);
  });
}

void tile_unpack(const void* tiled_values, int64_t word, int64_t rows, int64_t cols,
                 const uint32_t* masks, const int64_t* tile_offsets, int64_t nnz, void* values,
                 uint8_t* bitmask, int64_t* row_offsets) {
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    unpack_tiles(static_cast<const Word*>(tiled_values), rows, cols, masks, tile_offsets, nnz,
                 static_cast<Word*>(values), bitmask, row_offsets);
  });
}

void int8_tile_pack(const int8_t* values, const BitmapView& map, int64_t nnz, int64_t group_cols,
                    int8_t* tiled, uint64_t* masks, int64_t* tile_offsets, int32_t* row_sums) {
  bitmap_validate(map, nnz);
  check(group_cols > 0, "a scale covers at least one column, got ", group_cols);
  const int64_t padded_rows = (map.rows + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t groups = std::max<int64_t>(1, (map.cols + group_cols - 1) / group_cols);
  std::fill(row_sums, row_sums + groups * padded_rows, 0);
  pack_tiles(values, map, nnz, tiled, masks, tile_offsets);
  const int64_t bytes = mask_bytes(map.cols);
  parallel_for(map.rows, map.rows * map.cols, [&](int64_t r) {
    const int8_t* next = values + map.row_offsets[r];
    for_each_bit(map.bitmask + r * bytes, bytes,
                 [&](int64_t col) { row_sums[col / group_cols * padded_rows + r] += *next++; });
  });
}

void int8_tile_unpack(const int8_t* tiled, int64_t rows, int64_t cols, const uint64_t* masks,
                      const int64_t* tile_offsets, int64_t nnz, int8_t* values, uint8_t* bitmask,
                      int64_t* row_offsets) {
  unpack_tiles(tiled, rows, cols, masks, tile_offsets, nnz, values, bitmask, row_offsets);
}

}  // namespace pysparse
