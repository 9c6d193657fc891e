// Row-major bitmap <-> N:M tiles (nm.h).
#include "pysparse/nm.h"

#include <vector>

#include "bits.h"
#include "pysparse/formats.h"
#include "pysparse/nm_slots.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

// The first group of a row that keeps more than n weights, or -1.
int64_t crowded_group(const uint8_t* row, int64_t bytes, int64_t groups, int n, int m) {
  int64_t current = -1, crowded = -1;
  int count = 0;
  for_each_bit(row, bytes, [&](int64_t col) {
    const int64_t group = col / m;
    count = group == current ? count + 1 : 1;
    current = group;
    if (count > n && group < groups && crowded < 0) crowded = group;
  });
  return crowded;
}

template <class Word>
void pack_row(const Word* source, const uint8_t* mask, int64_t bytes, const NmLayout& layout,
              int64_t row, Word* values, uint8_t* indices) {
  const int n = layout.n, m = layout.m;
  const int64_t main_cols = layout.groups() * m;
  BlockCursor cursor(layout, row);
  const auto put = [&](int slot, int index, Word value) {
    values[cursor.place(slot)] = value;
    cursor.write_index(indices, slot, index);
  };
  int count = 0, last = 0;
  const auto finish_group = [&] {  // the places that the group leaves free
    if (count == 0 && n > 1) put(0, 1, Word{});
    for (int slot = count; count > 0 && slot < n; ++slot) put(slot, last, Word{});
    cursor.next_group();
    count = 0;
  };
  for_each_bit(mask, bytes, [&](int64_t col) {
    const Word value = *source++;
    if (col >= main_cols) {
      const SlotPlace at = tail_place(layout, row, col - main_cols);
      values[at.step * layout.step_values() + at.lane] = value;
      return;
    }
    while (col >= (cursor.group() + 1) * m) finish_group();
    last = static_cast<int>(col - cursor.group() * m);
    put(count++, last, value);
  });
  while (cursor.group() < layout.groups()) finish_group();
}

template <class Word>
auto has_bits(const Word* values) {
  return [values](int64_t place) { return values[place] != 0; };
}

}  // namespace

void nm_check_layout(const NmLayout& layout) {
  check(layout.n >= 1 && layout.n < layout.m && layout.m <= kMaxGroup, "pattern ", layout.n, ":",
        layout.m, " must keep n of m with 1 <= n < m <= ", kMaxGroup);
  check(layout.rows >= 0 && layout.cols >= 0, "negative shape ", layout.rows, " x ", layout.cols);
  check(layout.cols == 0 || layout.rows <= INT64_MAX / 64 / layout.cols, "shape ", layout.rows,
        " x ", layout.cols, " is too large");
}

void nm_validate(const NmView& weight, const NmSizes& sizes) {
  const NmLayout& layout = weight.layout;
  nm_check_layout(layout);
  const int64_t values = layout.tiles() * layout.tile_values();
  const int64_t bytes = layout.tiles() * layout.tile_bytes();
  check(sizes.values == values && sizes.indices == bytes + kIndexPadding,
        "values and indices hold ", sizes.values, " and ", sizes.indices, " entries, a ", layout.n,
        ":", layout.m, " weight of shape ", layout.rows, " x ", layout.cols, " has ", values,
        " and ", bytes, " + ", kIndexPadding);
  if ((1 << layout.bits()) == layout.m) return;  // every index there is lies inside
  const int64_t steps = layout.tiles() * layout.blocks() * layout.block_steps();
  for (int64_t step = 0; step < steps; ++step) {
    for (int lane = 0; lane < layout.step_values(); ++lane) {
      const int index =
          read_index(weight.indices + step * layout.step_bytes(), lane, layout.bits());
      check(index < layout.m, "index ", index, " in step ", step, " lies outside its group of ",
            layout.m);
    }
  }
}

void nm_check_pattern(const BitmapView& map, int n, int m) {
  nm_check_layout({n, m, 2, map.rows, map.cols});
  const int64_t bytes = mask_bytes(map.cols), groups = map.cols / m;
  std::vector<int64_t> crowded(map.rows, -1);
  parallel_for(map.rows, map.rows * map.cols, [&](int64_t r) {
    crowded[r] = crowded_group(map.bitmask + r * bytes, bytes, groups, n, m);
  });
  for (int64_t r = 0; r < map.rows; ++r) {
    const int64_t first = crowded[r] * m;
    if (crowded[r] < 0) continue;
    int kept = 0;
    for_each_bit(map.bitmask + r * bytes, bytes,
                 [&](int64_t col) { kept += col >= first && col < first + m; });
    fail("pattern ", n, ":", m, " keeps ", n, " of ", m, ", but row ", r, ", columns ", first,
         " to ", first + m - 1, " keep ", kept);
  }
}

void nm_pack(const void* values, int64_t word, const BitmapView& map, int64_t nnz,
             const NmLayout& layout, void* packed, uint8_t* indices) {
  nm_check_layout(layout);
  bitmap_validate(map, nnz);
  nm_check_pattern(map, layout.n, layout.m);
  const int64_t bytes = mask_bytes(map.cols);
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(layout.tiles(), map.rows * map.cols, [&](int64_t t) {
      Word* target = static_cast<Word*>(packed) + t * layout.tile_values();
      uint8_t* target_indices = indices + t * layout.tile_bytes();
      std::fill(target, target + layout.tile_values(), Word{});
      std::fill(target_indices, target_indices + layout.tile_bytes(), uint8_t{});
      for (int64_t r = t * kTileRows; r < std::min(map.rows, (t + 1) * kTileRows); ++r)
        pack_row(static_cast<const Word*>(values) + map.row_offsets[r], map.bitmask + r * bytes,
                 bytes, layout, r - t * kTileRows, target, target_indices);
    });
  });
}

int64_t nm_unpack_mask(const NmView& weight, int64_t word, uint8_t* bitmask, int64_t* row_offsets) {
  const NmLayout& layout = weight.layout;
  const int64_t bytes = mask_bytes(layout.cols);
  std::fill(bitmask, bitmask + layout.rows * bytes, uint8_t{0});
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(layout.rows, layout.rows * layout.cols, [&](int64_t r) {
      const int64_t tile = r / kTileRows;
      const Word* values = static_cast<const Word*>(weight.values) + tile * layout.tile_values();
      int64_t count = 0;
      for_each_slot(weight, tile, r % kTileRows, has_bits(values), [&](int64_t col, int64_t) {
        bitmask[r * bytes + col / 8] |= static_cast<uint8_t>(1u << (col % 8));
        ++count;
      });
      row_offsets[r] = count;
    });
  });
  int64_t total = 0;
  for (int64_t r = 0; r < layout.rows; ++r) {
    const int64_t count = row_offsets[r];
    row_offsets[r] = total;
    total += count;
  }
  return total;
}

void nm_unpack_values(const NmView& weight, int64_t word, const int64_t* row_offsets,
                      void* values) {
  const NmLayout& layout = weight.layout;
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(layout.rows, layout.rows * layout.cols, [&](int64_t r) {
      const int64_t tile = r / kTileRows;
      const Word* source = static_cast<const Word*>(weight.values) + tile * layout.tile_values();
      Word* target = static_cast<Word*>(values) + row_offsets[r];
      for_each_slot(weight, tile, r % kTileRows, has_bits(source),
                    [&](int64_t, int64_t place) { *target++ = source[place]; });
    });
  });
}

void nm_row_sums(const NmView& weight, int64_t group_cols, int32_t* row_sums) {
  const NmLayout& layout = weight.layout;
  check(group_cols > 0, "a scale covers at least one column, got ", group_cols);
  const int64_t groups = std::max<int64_t>(1, (layout.cols + group_cols - 1) / group_cols);
  const int64_t padded_rows = layout.tiles() * kTileRows;
  std::fill(row_sums, row_sums + groups * padded_rows, 0);
  parallel_for(layout.rows, layout.rows * layout.cols, [&](int64_t r) {
    const int64_t tile = r / kTileRows;
    const int8_t* values = static_cast<const int8_t*>(weight.values) + tile * layout.tile_values();
    for_each_slot(weight, tile, r % kTileRows, has_bits(values), [&](int64_t col, int64_t place) {
      row_sums[col / group_cols * padded_rows + r] += values[place];
    });
  });
}

}  // namespace pysparse
