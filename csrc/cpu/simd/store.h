#pragma once
// Writes one token's sums of consecutive rows: adds the bias, rounds once to the output type.
#include <algorithm>

#include "pysparse/views.h"

namespace pysparse {
namespace {

template <class T>
void store_rows_as(const float* sums, int64_t first_row, int64_t count, int64_t token,
                   const OutputView& output) {
  T* y = static_cast<T*>(output.values) + token * output.rows + first_row;
  const T* bias = static_cast<const T*>(output.bias);
  for (int64_t r = 0; r < count; ++r)
    assign(y[r], bias ? sums[r] + to_float(bias[first_row + r]) : sums[r]);
}

// `sums` holds `count` rows from `first_row` on; rows past the end of the output are dropped.
[[maybe_unused]] void store_rows(const float* sums, int64_t first_row, int64_t count, int64_t token,
                                 const OutputView& output) {
  const int64_t rows = std::min(count, output.rows - first_row);
  if (output.dtype == DType::kFloat32)
    store_rows_as<float>(sums, first_row, rows, token, output);
  else
    store_rows_as<BFloat16>(sums, first_row, rows, token, output);
}

}  // namespace
}  // namespace pysparse
