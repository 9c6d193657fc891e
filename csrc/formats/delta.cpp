// Row-major bitmap <-> rows of 4-bit column steps (device_layout.h).
#include <cstring>
#include <limits>

#include "bits.h"
#include "pysparse/device_formats.h"
#include "pysparse/device_layout.h"
#include "pysparse/formats.h"
#include "pysparse/parallel.h"
#include "strips.h"

namespace pysparse {
namespace {

using namespace layout;

// Calls emit(step, is_filler) for each entry of a row, the last group completed with fillers.
template <class Emit>
void for_each_entry(const uint8_t* row, int64_t bytes, const Emit& emit) {
  int64_t column = -1, entries = 0;
  for_each_bit(row, bytes, [&](int64_t next) {
    for (; next - column > kLongestStep; column += kLongestStep, ++entries)
      emit(kLongestStep, true);
    emit(static_cast<int>(next - column), false);
    column = next;
    ++entries;
  });
  for (; entries % kGroupEntries; ++entries) emit(1, true);
}

}  // namespace

int64_t delta_count(const BitmapView& map, int64_t nnz, int32_t* row_groups) {
  bitmap_validate(map, nnz);
  const int64_t bytes = mask_bytes(map.cols);
  row_groups[0] = 0;
  parallel_for(map.rows, map.rows * bytes, [&](int64_t r) {
    int64_t entries = 0;
    for_each_entry(map.bitmask + r * bytes, bytes, [&](int, bool) { ++entries; });
    row_groups[r + 1] = static_cast<int32_t>(entries / kGroupEntries);
  });
  int64_t total = 0;
  for (int64_t r = 1; r <= map.rows; ++r) {
    total += row_groups[r];
    check(total <= std::numeric_limits<int32_t>::max() / kGroupEntries, "row ", r - 1,
          " is past the 2^28 groups that 32-bit offsets reach; split the matrix");
    row_groups[r] = static_cast<int32_t>(total);
  }
  return total;
}

void delta_pack(const uint16_t* source, const BitmapView& map, const int32_t* row_groups,
                uint16_t* values, uint32_t* deltas, int32_t* chunk_cols) {
  const int64_t bytes = mask_bytes(map.cols);
  std::fill(chunk_cols, chunk_cols + chunk_slots(map.rows, row_groups[map.rows]), 0);
  parallel_for(map.rows, map.rows * map.cols, [&](int64_t r) {
    const uint16_t* next = source + map.row_offsets[r];
    int64_t group = row_groups[r], entries = 0;
    int32_t column = -1;
    for_each_entry(map.bitmask + r * bytes, bytes, [&](int step, bool filler) {
      const int64_t index = group + entries / kGroupEntries, place = entries % kGroupEntries;
      if (entries % (kGroupEntries * kChunkGroups) == 0)
        chunk_cols[chunk_slot(r, group, entries / (kGroupEntries * kChunkGroups))] = column;
      if (place == 0) deltas[index] = 0;
      deltas[index] |= static_cast<uint32_t>(step - 1) << (4 * place);
      values[index * kGroupEntries + place] = filler ? kFiller : unsigned_zero(*next++);
      column += step;
      ++entries;
    });
  });
}

int64_t delta_unpack(const uint16_t* values, const uint32_t* deltas, const int32_t* row_groups,
                     int64_t rows, int64_t cols, uint16_t* target, uint8_t* bitmask,
                     int64_t* row_offsets) {
  const int64_t bytes = mask_bytes(cols);
  if (!target) std::fill(bitmask, bitmask + rows * bytes, uint8_t{0});
  parallel_for(rows, rows * cols, [&](int64_t r) {
    int64_t column = -1, count = 0;
    for (int64_t e = int64_t{row_groups[r]} * kGroupEntries;
         e < int64_t{row_groups[r + 1]} * kGroupEntries; ++e) {
      column += (deltas[e / kGroupEntries] >> (4 * (e % kGroupEntries)) & 15u) + 1;
      if (values[e] == kFiller) continue;
      check(column < cols, "row ", r, " holds column ", column, " of a matrix with ", cols);
      if (target)
        target[row_offsets[r] + count] = values[e];
      else
        bitmask[r * bytes + column / 8] |= static_cast<uint8_t>(1u << (column % 8));
      ++count;
    }
    if (!target) row_offsets[r] = count;
  });
  return target ? 0 : exclusive_sum(row_offsets, rows);
}

}  // namespace pysparse
