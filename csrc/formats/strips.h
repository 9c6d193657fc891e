#pragma once
// What the packers of 16 x 64 blocks share.
#include <algorithm>
#include <array>
#include <cstring>

#include "bits.h"
#include "pysparse/device_layout.h"
#include "pysparse/parallel.h"

namespace pysparse {

inline uint16_t unsigned_zero(uint16_t value) {
  return value == layout::kFiller ? uint16_t{0} : value;
}

// Replaces counts by their exclusive running sum; returns the total.
inline int64_t exclusive_sum(int64_t* counts, int64_t size) {
  int64_t total = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t count = counts[i];
    counts[i] = total;
    total += count;
  }
  return total;
}

// The 16 rows of a strip of a row-major bitmap, read 64 columns at a time.
class StripReader {
 public:
  StripReader(const uint16_t* source, const BitmapView& map, int64_t strip)
      : source_(source), map_(map), first_(strip * layout::kStripRows) {
    for (int r = 0; r < layout::kStripRows && first_ + r < map.rows; ++r)
      next_[r] = map.row_offsets[first_ + r];
  }

  // Moves to block `block`; blocks must be visited in order.
  void load(int64_t block) {
    const int64_t bytes = mask_bytes(map_.cols);
    for (int r = 0; r < layout::kStripRows; ++r) {
      next_[r] += __builtin_popcountll(words_[r]);
      words_[r] =
          first_ + r < map_.rows ? mask_word(map_.bitmask + (first_ + r) * bytes, bytes, block) : 0;
    }
  }
  bool keeps(layout::Place at) const { return words_[at.row] >> at.col & 1u; }
  uint16_t value(layout::Place at) const {
    const uint64_t below = words_[at.row] & ((uint64_t{1} << at.col) - 1);
    return unsigned_zero(source_[next_[at.row] + __builtin_popcountll(below)]);
  }
  int count() const {
    int total = 0;
    for (const uint64_t word : words_) total += __builtin_popcountll(word);
    return total;
  }
  int64_t row(int r) const { return first_ + r; }

 private:
  const uint16_t* source_;  // null for a reader that only counts
  const BitmapView& map_;
  int64_t first_;
  std::array<int64_t, layout::kStripRows> next_{};
  std::array<uint64_t, layout::kStripRows> words_{};
};

// Collects the weights of one 16 x 64 block and appends them to rows of a row-major bitmap.
class StripWriter {
 public:
  StripWriter(int64_t strip, int64_t rows, int64_t cols, uint16_t* target, uint8_t* bitmask,
              int64_t* row_offsets)
      : first_(strip * layout::kStripRows),
        rows_(rows),
        cols_(cols),
        target_(target),
        bitmask_(bitmask) {
    for (int r = 0; r < layout::kStripRows && first_ + r < rows; ++r) {
      next_[r] = target ? row_offsets[first_ + r] : 0;
    }
  }
  void put(layout::Place at, uint16_t value) {
    words_[at.row] |= uint64_t{1} << at.col;
    values_[at.row][at.col] = value;
  }
  void flush(int64_t block) {
    const int64_t bytes = mask_bytes(cols_), left = cols_ - block * layout::kBlockCols;
    for (int r = 0; r < layout::kStripRows; ++r) {
      const uint64_t word = words_[r];
      words_[r] = 0;
      check(!word || (first_ + r < rows_ && (left >= 64 || word >> left == 0)), "block ", block,
            " of row ", first_ + r, " holds weights outside the ", rows_, " x ", cols_, " matrix");
      if (first_ + r >= rows_) continue;
      if (!target_)
        std::memcpy(bitmask_ + (first_ + r) * bytes + 8 * block, &word,
                    std::min<int64_t>(8, bytes - 8 * block));
      for (uint64_t bits = word; bits; bits &= bits - 1, ++next_[r])
        if (target_) target_[next_[r]] = values_[r][__builtin_ctzll(bits)];
    }
  }
  int64_t count(int r) const { return next_[r]; }

 private:
  int64_t first_, rows_, cols_;
  uint16_t* target_;
  uint8_t* bitmask_;
  std::array<int64_t, layout::kStripRows> next_{};
  std::array<uint64_t, layout::kStripRows> words_{};
  std::array<std::array<uint16_t, layout::kBlockCols>, layout::kStripRows> values_{};
};

// Runs read(strip, block, writer) over all blocks. Without target: fills bitmask and row_offsets,
// returns nnz.
template <class Read>
int64_t unpack_strips(int64_t rows, int64_t cols, uint16_t* target, uint8_t* bitmask,
                      int64_t* row_offsets, const Read& read) {
  const int64_t strips = layout::ceil_div(rows, layout::kStripRows),
                blocks = layout::ceil_div(cols, layout::kBlockCols);
  parallel_for(strips, rows * cols, [&](int64_t strip) {
    StripWriter writer(strip, rows, cols, target, bitmask, row_offsets);
    for (int64_t block = 0; block < blocks; ++block) {
      read(strip, block, writer);
      writer.flush(block);
    }
    for (int64_t r = 0; !target && r < layout::kStripRows && strip * layout::kStripRows + r < rows;
         ++r)
      row_offsets[strip * layout::kStripRows + r] = writer.count(static_cast<int>(r));
  });
  return target ? 0 : exclusive_sum(row_offsets, rows);
}

}  // namespace pysparse
