// Row-major values <-> int8 with one scale per row and group of columns.
#include "pysparse/int8.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bits.h"
#include "pysparse/formats.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

int64_t groups_of(int64_t cols, int64_t group_cols) {
  check(group_cols > 0, "a scale covers at least one column, got ", group_cols);
  return std::max<int64_t>(1, (cols + group_cols - 1) / group_cols);
}

// Adding and subtracting 1.5 * 2^23 rounds to nearest even, without the library call that nearbyint
// is on a baseline CPU.
int8_t quantize(float value, float scale) {
  constexpr float kRounder = 12582912.0f;
  if (scale == 0.0f) return 0;
  const float steps = std::clamp(value / scale, -127.0f, 127.0f);
  return static_cast<int8_t>(steps + kRounder - kRounder);
}

// Calls visit(group of columns) for each set bit of a row, ascending.
template <class Visit>
void for_each_grouped_bit(const uint8_t* row, int64_t bytes, int64_t group_cols,
                          const Visit& visit) {
  int64_t group = 0, end = group_cols;
  for_each_bit(row, bytes, [&](int64_t col) {
    for (; col >= end; end += group_cols) ++group;
    visit(group);
  });
}

}  // namespace

void int8_quantize(const float* values, const BitmapView& map, int64_t nnz, int64_t group_cols,
                   bool scales_given, int8_t* quantized, float* scales) {
  bitmap_validate(map, nnz);
  const int64_t groups = groups_of(map.cols, group_cols), bytes = mask_bytes(map.cols);
  parallel_for(map.rows, nnz * 8, [&](int64_t r) {
    float* row_scales = scales + r * groups;
    const float* source = values + map.row_offsets[r];
    if (!scales_given) {
      std::fill(row_scales, row_scales + groups, 0.0f);
      for_each_grouped_bit(map.bitmask + r * bytes, bytes, group_cols, [&](int64_t g) {
        float& largest = row_scales[g];
        largest = std::max(largest, std::fabs(*source++));
      });
      for (int64_t g = 0; g < groups; ++g) row_scales[g] /= 127.0f;
      source = values + map.row_offsets[r];
    }
    int8_t* target = quantized + map.row_offsets[r];
    for_each_grouped_bit(map.bitmask + r * bytes, bytes, group_cols,
                         [&](int64_t g) { *target++ = quantize(*source++, row_scales[g]); });
  });
}

void int8_dequantize(const int8_t* quantized, const float* scales, const BitmapView& map,
                     int64_t nnz, int64_t group_cols, float* values) {
  bitmap_validate(map, nnz);
  const int64_t groups = groups_of(map.cols, group_cols), bytes = mask_bytes(map.cols);
  parallel_for(map.rows, nnz * 8, [&](int64_t r) {
    const int8_t* source = quantized + map.row_offsets[r];
    float* target = values + map.row_offsets[r];
    for_each_grouped_bit(map.bitmask + r * bytes, bytes, group_cols, [&](int64_t g) {
      *target++ = static_cast<float>(*source++) * scales[r * groups + g];
    });
  });
}

}  // namespace pysparse
