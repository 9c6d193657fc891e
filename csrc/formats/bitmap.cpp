// Dense <-> row-major bitmap, and the check that a bitmap from a stranger must pass.
#include <atomic>
#include <vector>

#include "bits.h"
#include "pysparse/formats.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

void check_shape(int64_t rows, int64_t cols) {
  check(rows >= 0 && cols >= 0, "negative shape ", rows, " x ", cols);
  check(cols == 0 || rows <= INT64_MAX / 8 / cols, "shape ", rows, " x ", cols, " is too large");
}

void check_row(const BitmapView& map, int64_t row, int64_t nnz) {
  const int64_t bytes = mask_bytes(map.cols), begin = map.row_offsets[row];
  const int64_t count = count_bits(map.bitmask + row * bytes, bytes);
  check(begin >= 0 && count <= nnz && begin <= nnz - count, "row ", row, " spans values [", begin,
        ", ", begin, " + ", count, ") of ", nnz);
}

}  // namespace

int64_t bitmap_pack_mask(const uint8_t* keep, int64_t rows, int64_t cols, uint8_t* bitmask,
                         int64_t* row_offsets) {
  check_shape(rows, cols);
  const int64_t bytes = mask_bytes(cols);
  parallel_for(rows, rows * cols, [&](int64_t r) {
    const uint8_t* source = keep + r * cols;
    uint8_t* target = bitmask + r * bytes;
    for (int64_t b = 0; b < bytes; ++b) {
      unsigned bits = 0;
      const int64_t lanes = std::min<int64_t>(8, cols - 8 * b);
      for (int64_t i = 0; i < lanes; ++i) bits |= (source[8 * b + i] != 0 ? 1u : 0u) << i;
      target[b] = static_cast<uint8_t>(bits);
    }
    row_offsets[r] = count_bits(target, bytes);
  });
  int64_t total = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t count = row_offsets[r];
    row_offsets[r] = total;
    total += count;
  }
  return total;
}

void bitmap_validate(const BitmapView& map, int64_t nnz) {
  check_shape(map.rows, map.cols);
  const int64_t bytes = mask_bytes(map.cols);
  const unsigned tail = map.cols % 8 ? 0xffu << (map.cols % 8) & 0xffu : 0u;
  int64_t total = 0;
  for (int64_t r = 0; r < map.rows; ++r) {
    const uint8_t* row = map.bitmask + r * bytes;
    check(map.row_offsets[r] == total, "row_offsets[", r, "] is ", map.row_offsets[r],
          ", but the bits of the rows before it count ", total);
    check(bytes == 0 || (row[bytes - 1] & tail) == 0, "row ", r,
          " of bitmask has bits set beyond column ", map.cols - 1);
    total += count_bits(row, bytes);
  }
  check(total == nnz, "bitmask keeps ", total, " values, but ", nnz, " are stored");
}

void bitmap_gather(const void* dense, int64_t word, const BitmapView& map, void* values,
                   int64_t nnz) {
  check_shape(map.rows, map.cols);
  for (int64_t r = 0; r < map.rows; ++r) check_row(map, r, nnz);
  const int64_t bytes = mask_bytes(map.cols);
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(map.rows, map.rows * map.cols * word, [&](int64_t r) {
      const Word* source = static_cast<const Word*>(dense) + r * map.cols;
      Word* target = static_cast<Word*>(values) + map.row_offsets[r];
      for_each_bit(map.bitmask + r * bytes, bytes, [&](int64_t col) { *target++ = source[col]; });
    });
  });
}

void bitmap_scatter(const void* values, int64_t word, const BitmapView& map, int64_t nnz,
                    void* dense) {
  bitmap_validate(map, nnz);
  const int64_t bytes = mask_bytes(map.cols);
  with_word(word, [&](auto zero) {
    using Word = decltype(zero);
    parallel_for(map.rows, map.rows * map.cols * word, [&](int64_t r) {
      const Word* source = static_cast<const Word*>(values) + map.row_offsets[r];
      Word* target = static_cast<Word*>(dense) + r * map.cols;
      for_each_bit(map.bitmask + r * bytes, bytes, [&](int64_t col) { target[col] = *source++; });
    });
  });
}

}  // namespace pysparse
