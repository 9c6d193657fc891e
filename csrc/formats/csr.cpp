// Column indices of a bitmap, for exchange with libraries that speak CSR.
#include "bits.h"
#include "pysparse/formats.h"
#include "pysparse/parallel.h"

namespace pysparse {

void csr_indices(const BitmapView& map, int64_t nnz, int32_t* col_indices) {
  bitmap_validate(map, nnz);
  check(map.cols <= INT32_MAX, "column indices are 32-bit: ", map.cols, " columns do not fit");
  const int64_t bytes = mask_bytes(map.cols);
  parallel_for(map.rows, map.rows * map.cols, [&](int64_t r) {
    int32_t* target = col_indices + map.row_offsets[r];
    for_each_bit(map.bitmask + r * bytes, bytes,
                 [&](int64_t col) { *target++ = static_cast<int32_t>(col); });
  });
}

}  // namespace pysparse
