// Tiled bitmap -> blocks of pairs -> row-major bitmap (views.h), a block of 256 rows at a time.
#include "pairs.h"

#include <algorithm>
#include <array>
#include <vector>

#include "bits.h"
#include "pysparse/formats.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

constexpr int64_t kTiles = kPairRows / kTileRows;  // of the bitmap, to a block of rows
constexpr int kMostPairs = kPairCols / 2;

Range tiles_of(const TiledBitmapView& tiled, int64_t row_block) {
  return {row_block * kTiles, std::min(tiled.tiles(), (row_block + 1) * kTiles)};
}

Range cells_of(const TiledBitmapView& tiled, int64_t col_block, int64_t block_cols) {
  const int64_t cells = block_cols / 2;
  return {col_block * cells, std::min(tiled.pairs(), (col_block + 1) * cells)};
}

using RowCounts = std::array<int, kPairRows>;

RowCounts count_rows(const TiledBitmapView& tiled, int64_t row_block, const Range& cells) {
  RowCounts counts{};
  const Range tiles = tiles_of(tiled, row_block);
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    int* rows = counts.data() + (t - tiles.begin) * kTileRows;
    for (int64_t p = cells.begin; p < cells.end; ++p)
      for (uint32_t bits = tiled.masks[t * tiled.pairs() + p], r = 0; bits; bits >>= 2, ++r)
        rows[r] += __builtin_popcount(bits & 3u);
  }
  return counts;
}

// Sorts the slots of a block by their number of pairs, ties in row order; returns the entries.
int64_t order_rows(const RowCounts& rows, int64_t slots, uint8_t* order, uint8_t* counts) {
  std::array<int, kMostPairs + 2> start{};
  const auto pairs_in = [&](int64_t slot) { return (rows[slot] + 1) / 2; };
  for (int64_t s = 0; s < slots; ++s) ++start[pairs_in(s) + 1];
  for (int p = 0; p <= kMostPairs; ++p) start[p + 1] += start[p];
  for (int64_t s = 0; s < slots; ++s) order[start[pairs_in(s)]++] = static_cast<uint8_t>(s);
  int64_t entries = 0;
  for (int64_t s = 0; s < slots; s += kPairGroup) {
    const int longest = pairs_in(order[s + kPairGroup - 1]);
    counts[s / kPairGroup] = static_cast<uint8_t>(longest);
    entries += longest * kPairGroup;
  }
  return entries;
}

void check_tiles(const TiledBitmapView& tiled, int64_t nnz) {
  check(tiled.rows >= 0 && tiled.cols >= 0, "negative shape ", tiled.rows, " x ", tiled.cols);
  check(tiled.tile_offsets[0] == 0 && tiled.tile_offsets[tiled.tiles()] == nnz,
        "tile_offsets run from ", tiled.tile_offsets[0], " to ", tiled.tile_offsets[tiled.tiles()],
        ", expected 0 to ", nnz);
  for (int64_t t = 0; tiled.cols % 2 && t < tiled.tiles(); ++t)
    check((tiled.masks[(t + 1) * tiled.pairs() - 1] & 0xaaaaaaaau) == 0, "tile ", t,
          " keeps values beyond column ", tiled.cols - 1);
}

void check_block_rows(const TiledBitmapView& tiled, int64_t row_block,
                      const std::vector<int64_t>& tile_counts, int64_t outside) {
  check(outside == 0, "rows beyond ", tiled.rows, " keep ", outside, " values");
  const Range tiles = tiles_of(tiled, row_block);
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const int64_t stated = tiled.tile_offsets[t + 1] - tiled.tile_offsets[t];
    check(tile_counts[t] == stated, "tile ", t, " keeps ", tile_counts[t],
          " values, its offsets say ", stated);
  }
}

// The weights of one block, row by row.
template <class Word>
struct RowLists {
  RowCounts counts{};
  std::vector<uint8_t> cols = std::vector<uint8_t>(kPairRows * kPairCols);
  std::vector<Word> values = std::vector<Word>(kPairRows * kPairCols);

  void push(int64_t row, int64_t col, Word value) {
    const int64_t place = row * kPairCols + counts[row]++;
    cols[place] = static_cast<uint8_t>(col);
    values[place] = value;
  }
};

template <class Word>
void gather(const TiledBitmapView& tiled, int64_t row_block, const Range& cells,
            std::array<const Word*, kTiles>& next, RowLists<Word>& lists) {
  const Range tiles = tiles_of(tiled, row_block);
  lists.counts.fill(0);
  for (int64_t t = tiles.begin; t < tiles.end; ++t) {
    const Word* source = next[t - tiles.begin];
    const int64_t first_row = (t - tiles.begin) * kTileRows;
    for (int64_t p = cells.begin; p < cells.end; ++p)
      for (uint32_t bits = tiled.masks[t * tiled.pairs() + p]; bits; bits &= bits - 1) {
        const int bit = __builtin_ctz(bits);
        lists.push(first_row + bit / 2, 2 * (p - cells.begin) + bit % 2, *source++);
      }
    next[t - tiles.begin] = source;
  }
}

template <class Word>
void write_block(const RowLists<Word>& lists, const PairsView& plan, int64_t row_block,
                 int64_t col_block, Word* values, uint8_t* indices) {
  const int64_t first = plan.first_slot(row_block, col_block), slots = plan.slots(row_block);
  for (int64_t slot = 0; slot < slots; slot += kPairGroup) {
    const int64_t count = plan.counts[(first + slot) / kPairGroup];
    for (int64_t u = 0; u < kPairGroup; ++u) {
      const int64_t row = plan.row_order[first + slot + u], own = lists.counts[row];
      const uint8_t* cols = lists.cols.data() + row * kPairCols;
      const Word* source = lists.values.data() + row * kPairCols;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t entry = 2 * (i * kPairGroup + u);
        const bool has_first = 2 * i < own, has_second = 2 * i + 1 < own;
        values[entry] = has_first ? source[2 * i] : Word{};
        values[entry + 1] = has_second ? source[2 * i + 1] : Word{};
        indices[entry] = has_first ? cols[2 * i] : uint8_t{1};
        indices[entry + 1] = has_second ? cols[2 * i + 1] : has_first ? cols[2 * i] : uint8_t{0};
      }
    }
    values += 2 * count * kPairGroup;
    indices += 2 * count * kPairGroup;
  }
}

PairsView plan_view(const TiledBitmapView& tiled, const uint8_t* row_order, const uint8_t* counts,
                    const int64_t* block_offsets) {
  return {nullptr, nullptr, row_order, counts, block_offsets, tiled.rows, tiled.cols, tiled.dtype};
}

}  // namespace

int64_t pairs_plan(const TiledBitmapView& tiled, int64_t nnz, uint8_t* row_order, uint8_t* counts,
                   int64_t* block_offsets) {
  check_tiles(tiled, nnz);
  const PairsView plan = plan_view(tiled, row_order, counts, block_offsets);
  std::vector<int64_t> tile_counts(tiled.tiles()), outside(plan.row_blocks());
  block_offsets[0] = 0;
  parallel_for(plan.row_blocks(), tiled.rows * tiled.cols, [&](int64_t rb) {
    for (int64_t cb = 0; cb < plan.col_blocks(); ++cb) {
      const RowCounts rows = count_rows(tiled, rb, cells_of(tiled, cb, plan.block_cols()));
      const int64_t slot = plan.first_slot(rb, cb);
      block_offsets[rb * plan.col_blocks() + cb + 1] =
          order_rows(rows, plan.slots(rb), row_order + slot, counts + slot / kPairGroup);
      for (int64_t r = 0; r < kPairRows; ++r) {
        if (r >= plan.rows_in(rb))
          outside[rb] += rows[r];
        else
          tile_counts[(rb * kPairRows + r) / kTileRows] += rows[r];
      }
    }
  });
  for (int64_t rb = 0; rb < plan.row_blocks(); ++rb)
    check_block_rows(tiled, rb, tile_counts, outside[rb]);
  for (int64_t b = 0; b < plan.row_blocks() * plan.col_blocks(); ++b)
    block_offsets[b + 1] += block_offsets[b];
  return block_offsets[plan.row_blocks() * plan.col_blocks()];
}

void pairs_fill(const TiledBitmapView& tiled, const PairsView& plan, void* values,
                uint8_t* indices) {
  with_word(size_of(tiled.dtype), [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(plan.row_blocks(), tiled.rows * tiled.cols, [&](int64_t rb) {
      RowLists<Word> lists;
      std::array<const Word*, kTiles> next{};
      const Range tiles = tiles_of(tiled, rb);
      for (int64_t t = tiles.begin; t < tiles.end; ++t)
        next[t - tiles.begin] = static_cast<const Word*>(tiled.values) + tiled.tile_offsets[t];
      for (int64_t cb = 0; cb < plan.col_blocks(); ++cb) {
        gather(tiled, rb, cells_of(tiled, cb, plan.block_cols()), next, lists);
        const int64_t entry = plan.block_offsets[rb * plan.col_blocks() + cb];
        write_block(lists, plan, rb, cb, static_cast<Word*>(values) + 2 * entry,
                    indices + 2 * entry);
      }
    });
  });
}

int64_t pairs_mask(const PairsView& pairs, uint8_t* bitmask, int64_t* row_offsets) {
  const int64_t bytes = mask_bytes(pairs.cols);
  std::fill(bitmask, bitmask + pairs.rows * bytes, uint8_t{0});
  std::fill(row_offsets, row_offsets + pairs.rows, int64_t{0});
  with_word(size_of(pairs.dtype), [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(pairs.row_blocks(), pairs.rows * pairs.cols, [&](int64_t rb) {
      for (int64_t cb = 0; cb < pairs.col_blocks(); ++cb)
        for_each_in_block<Word>(pairs, rb, cb, [&](int64_t row, int64_t col, Word) {
          ++row_offsets[row];
          bitmask[row * bytes + col / 8] |= static_cast<uint8_t>(1u << (col % 8));
        });
    });
  });
  int64_t total = 0;
  for (int64_t r = 0; r < pairs.rows; ++r) {
    const int64_t count = row_offsets[r];
    row_offsets[r] = total;
    total += count;
  }
  return total;
}

void pairs_values(const PairsView& pairs, const int64_t* row_offsets, void* values) {
  with_word(size_of(pairs.dtype), [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(pairs.row_blocks(), pairs.rows * pairs.cols, [&](int64_t rb) {
      std::array<int64_t, kPairRows> next{};
      for (int64_t r = 0; r < pairs.rows_in(rb); ++r) next[r] = row_offsets[rb * kPairRows + r];
      for (int64_t cb = 0; cb < pairs.col_blocks(); ++cb)
        for_each_in_block<Word>(pairs, rb, cb, [&](int64_t row, int64_t, Word value) {
          static_cast<Word*>(values)[next[row - rb * kPairRows]++] = value;
        });
    });
  });
}

}  // namespace pysparse
