#pragma once
// Walks over the stored weights of a pair block.
#include "pysparse/views.h"

namespace pysparse {

// Calls visit(row, col, value) for each stored weight of a block, rows and columns counted within
// the matrix; a row's columns come in ascending order.
template <class Word, class Visit>
void for_each_in_block(const PairsView& pairs, int64_t row_block, int64_t col_block,
                       const Visit& visit) {
  const int64_t first = pairs.first_slot(row_block, col_block), slots = pairs.slots(row_block);
  int64_t entry = pairs.block_offsets[row_block * pairs.col_blocks() + col_block];
  for (int64_t slot = 0; slot < slots; slot += kPairGroup) {
    const int64_t count = pairs.counts[(first + slot) / kPairGroup];
    for (int64_t i = 0; i < count * kPairGroup; ++i, ++entry) {
      const int low = pairs.indices[2 * entry], high = pairs.indices[2 * entry + 1];
      if (low > high) continue;  // a short row's padding
      const int64_t row = row_block * kPairRows + pairs.row_order[first + slot + i % kPairGroup];
      const Word* values = static_cast<const Word*>(pairs.values) + 2 * entry;
      visit(row, col_block * pairs.block_cols() + low, values[0]);
      if (low < high) visit(row, col_block * pairs.block_cols() + high, values[1]);
    }
  }
}

}  // namespace pysparse
