// Row-major bitmap <-> rows of n:m groups for GPU kernels (NmRows in device_layout.h).
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "bits.h"
#include "pysparse/device_formats.h"
#include "pysparse/device_layout.h"
#include "pysparse/formats.h"
#include "pysparse/parallel.h"
#include "strips.h"

namespace pysparse {
namespace {

using namespace layout;

NmRows shape_of(int64_t n, int64_t m, int64_t cols) {
  const bool group = m == 4 || m == 8 || m == 16;
  check(group && n >= 1 && n < m, "pattern ", n, ":", m,
        " is none of n:4, n:8 and n:16 with n from 1 to m - 1");
  check(cols <= std::numeric_limits<int32_t>::max() - 16 * kVectorEntries, "a row of ", cols,
        " columns is past 32-bit columns");
  return nm_rows(static_cast<int>(n), __builtin_ctzll(static_cast<uint64_t>(m)),
                 static_cast<int>(cols));
}

[[noreturn]] void refuse(const BitmapView& map, int64_t row, int64_t group, int64_t n, int64_t m) {
  const int64_t last = std::min(group * m + m, map.cols) - 1;
  const uint8_t* mask = map.bitmask + row * mask_bytes(map.cols);
  int kept = 0;
  for (int64_t c = group * m; c <= last; ++c) kept += mask[c / 8] >> (c % 8) & 1;
  fail("row ", row, ", group ", group, " (columns ", group * m, " to ", last, ") keeps ", kept,
       " weights; this packing holds ", n, " of ", m);
}

// The words of places, `bits` bytes a vector; those of 3 bits are split as the kernel loads them.
class Places {
 public:
  Places(int bits, int64_t vectors) : bits_(bits), vectors_(vectors) {}

  uint32_t load(const uint8_t* places, int64_t vector) const {
    uint32_t word = 0;
    std::memcpy(&word, places + first_bytes() * vector, static_cast<size_t>(first_bytes()));
    if (bits_ == 3) word |= static_cast<uint32_t>(places[2 * vectors_ + vector]) << 16;
    return word;
  }
  void store(uint8_t* places, int64_t vector, uint32_t word) const {
    std::memcpy(places + first_bytes() * vector, &word, static_cast<size_t>(first_bytes()));
    if (bits_ == 3) places[2 * vectors_ + vector] = static_cast<uint8_t>(word >> 16);
  }

 private:
  int64_t first_bytes() const { return bits_ == 4 ? 4 : 2; }

  int bits_;
  int64_t vectors_;
};

}  // namespace

int64_t nm_rows_vectors(int64_t n, int64_t m, int64_t cols) {
  return shape_of(n, m, cols).vectors();
}

void nm_rows_pack(const uint16_t* source, const BitmapView& map, int64_t nnz, int64_t n, int64_t m,
                  uint16_t* values, uint8_t* places) {
  const NmRows shape = shape_of(n, m, map.cols);
  bitmap_validate(map, nnz);
  const int64_t bytes = mask_bytes(map.cols), each = shape.vectors();
  check(map.rows * each <= kNmMostVectors, map.rows, " rows of ", each,
        " vectors are past the 2^31 that 32 bits count; split the matrix");
  const Places layout(shape.bits, map.rows * each);
  parallel_for(map.rows, map.rows * map.cols, [&](int64_t r) {
    const uint16_t* next = source + map.row_offsets[r];
    uint16_t* row = values + r * each * kVectorEntries;
    std::fill(row, row + each * kVectorEntries, kFiller);
    std::vector<uint32_t> words(static_cast<size_t>(each));
    int64_t current = -1;
    int kept = 0;
    for_each_bit(map.bitmask + r * bytes, bytes, [&](int64_t column) {
      const int64_t group = column / m;
      kept = group == current ? kept + 1 : 1;
      current = group;
      if (kept > n) refuse(map, r, group, n, m);
      const int vector = shape.vector_of(static_cast<int>(group), kept - 1);
      const int entry = shape.entry_of(static_cast<int>(group));
      row[vector * kVectorEntries + entry] = unsigned_zero(*next++);
      words[static_cast<size_t>(vector)] |= static_cast<uint32_t>(column % m)
                                            << (shape.bits * entry);
    });
    for (int64_t v = 0; v < each; ++v)
      layout.store(places, r * each + v, words[static_cast<size_t>(v)]);
  });
}

int64_t nm_rows_unpack(const uint16_t* values, const uint8_t* places, int64_t n, int64_t m,
                       int64_t rows, int64_t cols, uint16_t* target, uint8_t* bitmask,
                       int64_t* row_offsets) {
  const NmRows shape = shape_of(n, m, cols);
  const int64_t bytes = mask_bytes(cols), each = shape.vectors();
  const Places layout(shape.bits, rows * each);
  const uint32_t mask = static_cast<uint32_t>(m - 1);
  if (!target) std::fill(bitmask, bitmask + rows * bytes, uint8_t{0});
  parallel_for(rows, rows * cols, [&](int64_t r) {
    int64_t count = 0;
    for (int group = 0; group < shape.runs * kVectorEntries; ++group) {
      int64_t before = -1;
      for (int rank = 0; rank < shape.n; ++rank) {
        const int64_t vector = r * each + shape.vector_of(group, rank);
        const int entry = shape.entry_of(group);
        const uint16_t value = values[vector * kVectorEntries + entry];
        if (value == kFiller) continue;
        const int64_t column =
            group * m + (layout.load(places, vector) >> (shape.bits * entry) & mask);
        check(column < cols, "row ", r, " holds column ", column, " of a matrix with ", cols);
        check(column > before, "row ", r, " holds column ", column, " after column ", before);
        before = column;
        if (target)
          target[row_offsets[r] + count] = value;
        else
          bitmask[r * bytes + column / 8] |= static_cast<uint8_t>(1u << (column % 8));
        ++count;
      }
    }
    if (!target) row_offsets[r] = count;
  });
  return target ? 0 : exclusive_sum(row_offsets, rows);
}

}  // namespace pysparse
