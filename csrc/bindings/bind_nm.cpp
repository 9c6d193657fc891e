#include <pybind11/stl.h>

#include <algorithm>
#include <utility>

#include "bind.h"
#include "pysparse/nm.h"

namespace pysparse {
namespace {

using Array = std::pair<uintptr_t, int64_t>;  // address and number of elements

int per_row(int64_t word) { return word == 1 ? 4 : 2; }

NmView view(const Array& values, const Array& indices, int n, int m, int64_t rows, int64_t cols,
            int64_t word) {
  return {pointer<const void>(values.first),
          pointer<const uint8_t>(indices.first),
          {n, m, per_row(word), rows, cols}};
}

RowScales row_scales(const Array& scales, const Array& row_sums, int64_t group_cols, int64_t rows,
                     int64_t cols) {
  const int64_t groups =
      group_cols > 0 ? std::max<int64_t>(1, (cols + group_cols - 1) / group_cols) : 1;
  return {pointer<const float>(scales.first), pointer<const int32_t>(row_sums.first), groups,
          group_cols, (rows + kTileRows - 1) / kTileRows * kTileRows};
}

BitmapView map(int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets) {
  return {pointer<const uint8_t>(bitmask), pointer<const int64_t>(row_offsets), rows, cols};
}

void bind_packing(pybind11::module_& module) {
  module.def("nm_sizes", [](int n, int m, int64_t rows, int64_t cols, int64_t word) {
    const NmLayout layout{n, m, per_row(word), rows, cols};
    nm_check_layout(layout);
    return std::pair{layout.tiles() * layout.tile_values(),
                     layout.tiles() * layout.tile_bytes() + kIndexPadding};
  });
  module.def("nm_block_cols", [](int n, int m, int64_t word) {
    return NmLayout{n, m, per_row(word), 0, 0}.block_cols();
  });
  module.def("nm_has_vector_kernel", [](int n, int m) { return covers_common(n, m); });
  module.def(
      "nm_pack",
      [](uintptr_t values, int64_t word, int n, int m, int64_t rows, int64_t cols,
         uintptr_t bitmask, uintptr_t row_offsets, int64_t nnz, uintptr_t packed,
         uintptr_t indices) {
        nm_pack(pointer<const void>(values), word, map(rows, cols, bitmask, row_offsets), nnz,
                {n, m, per_row(word), rows, cols}, pointer<void>(packed),
                pointer<uint8_t>(indices));
      },
      ReleaseGil());
  module.def(
      "nm_validate",
      [](const Array& values, const Array& indices, int64_t word, int n, int m, int64_t rows,
         int64_t cols) {
        nm_validate(view(values, indices, n, m, rows, cols, word), {values.second, indices.second});
      },
      ReleaseGil());
  module.def(
      "nm_unpack_mask",
      [](const Array& values, const Array& indices, int64_t word, int n, int m, int64_t rows,
         int64_t cols, uintptr_t bitmask, uintptr_t row_offsets) {
        return nm_unpack_mask(view(values, indices, n, m, rows, cols, word), word,
                              pointer<uint8_t>(bitmask), pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.def(
      "nm_unpack_values",
      [](const Array& values, const Array& indices, int64_t word, int n, int m, int64_t rows,
         int64_t cols, uintptr_t row_offsets, uintptr_t target) {
        nm_unpack_values(view(values, indices, n, m, rows, cols, word), word,
                         pointer<const int64_t>(row_offsets), pointer<void>(target));
      },
      ReleaseGil());
  module.def(
      "nm_row_sums",
      [](const Array& values, const Array& indices, int n, int m, int64_t rows, int64_t cols,
         int64_t group_cols, uintptr_t row_sums) {
        nm_row_sums(view(values, indices, n, m, rows, cols, 1), group_cols,
                    pointer<int32_t>(row_sums));
      },
      ReleaseGil());
}

}  // namespace

void bind_nm(pybind11::module_& module) {
  bind_packing(module);
  module.def(
      "nm_linear",
      [](int dtype, uintptr_t x, int64_t tokens, int64_t cols, const Array& values,
         const Array& indices, int n, int m, uintptr_t bias, uintptr_t y, int64_t rows) {
        const DType type = dtype_of(dtype);
        nm_linear(view(values, indices, n, m, rows, cols, size_of(type)),
                  {values.second, indices.second}, pointer<const void>(x), tokens,
                  {pointer<void>(y), pointer<const void>(bias), rows, type});
      },
      ReleaseGil());
  module.def(
      "nm_unpack",
      [](int dtype, const Array& values, const Array& indices, int n, int m, int64_t all_rows,
         int64_t cols, int64_t first_tile, int64_t rows, uintptr_t dense) {
        const int64_t word = size_of(dtype_of(dtype));
        nm_unpack(view(values, indices, n, m, all_rows, cols, word),
                  {values.second, indices.second}, first_tile, rows, dtype_of(dtype),
                  pointer<void>(dense));
      },
      ReleaseGil());
  module.def(
      "nm_int8_linear",
      [](int dtype, uintptr_t x, int64_t tokens, int64_t cols, int parts, const Array& values,
         const Array& indices, int n, int m, const Array& scales, const Array& row_sums,
         int64_t group_cols, uintptr_t bias, uintptr_t y, int64_t rows) {
        nm_int8_linear(view(values, indices, n, m, rows, cols, 1), {values.second, indices.second},
                       row_scales(scales, row_sums, group_cols, rows, cols), scales.second,
                       row_sums.second, pointer<const void>(x), tokens, parts,
                       {pointer<void>(y), pointer<const void>(bias), rows, dtype_of(dtype)});
      },
      ReleaseGil());
  module.def(
      "nm_int8_unpack",
      [](int dtype, const Array& values, const Array& indices, int n, int m, const Array& scales,
         const Array& row_sums, int64_t group_cols, int64_t all_rows, int64_t cols,
         int64_t first_tile, int64_t rows, uintptr_t dense) {
        nm_int8_unpack(view(values, indices, n, m, all_rows, cols, 1),
                       {values.second, indices.second},
                       row_scales(scales, row_sums, group_cols, all_rows, cols), first_tile, rows,
                       dtype_of(dtype), pointer<void>(dense));
      },
      ReleaseGil());
}

}  // namespace pysparse
