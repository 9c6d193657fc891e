#include <pybind11/stl.h>

#include <utility>

#include "bind.h"
#include "pysparse/cholesky.h"
#include "pysparse/obs.h"
#include "pysparse/select.h"

namespace pysparse {
namespace py = pybind11;
namespace {

using Array = std::pair<uintptr_t, int64_t>;  // an address and the number of entries

ScoredView scored(int dtype, uintptr_t weight, uintptr_t scale, int64_t rows, int64_t cols) {
  return {pointer<const void>(weight), pointer<const float>(scale), rows, cols, dtype_of(dtype)};
}

Selection selection(uintptr_t keep, uintptr_t pruned) {
  return {pointer<uint8_t>(keep), pointer<void>(pruned)};
}

void call_add_product(uintptr_t c, int64_t c_stride, uintptr_t a, int64_t a_stride, uintptr_t b,
                      int64_t b_row_stride, int64_t b_col_stride, int64_t rows, int64_t depth,
                      int64_t cols, float alpha) {
  add_product(pointer<float>(c), c_stride, {pointer<const float>(a), rows, depth, a_stride, 1},
              {pointer<const float>(b), depth, cols, b_row_stride, b_col_stride}, alpha);
}

void call_obs_sweep(uintptr_t weight, uintptr_t upper, uintptr_t scale, uintptr_t keep,
                    int64_t rows, int64_t cols, int64_t block, bool joint, const Array& counts,
                    int n, int m, const Array& steps, int64_t group_cols) {
  const ObsGroup group = n ? ObsGroup::kNm : joint ? ObsGroup::kMatrix : ObsGroup::kRow;
  obs_sweep({pointer<float>(weight),
             pointer<const float>(upper),
             pointer<const float>(scale),
             pointer<uint8_t>(keep),
             rows,
             cols,
             block,
             group,
             pointer<const int64_t>(counts.first),
             counts.second,
             n,
             m,
             {pointer<const float>(steps.first), rows > 0 ? steps.second / rows : 1, group_cols}});
}

}  // namespace

void bind_pruning(pybind11::module_& module) {
  module.attr("CHOLESKY_LEAF") = kLeaf;
  module.def("add_product", &call_add_product, ReleaseGil());
  module.def(
      "inverse_cholesky_leaf",
      [](uintptr_t matrix, int64_t size, int64_t stride) {
        return inverse_cholesky_leaf(pointer<float>(matrix), size, stride);
      },
      ReleaseGil());
  module.def("obs_sweep", &call_obs_sweep, py::arg("weight"), py::arg("upper"), py::arg("scale"),
             py::arg("keep"), py::arg("rows"), py::arg("cols"), py::arg("block"), py::arg("joint"),
             py::arg("counts"), py::arg("n"), py::arg("m"), py::arg("steps") = Array{0, 0},
             py::arg("group_cols") = 1, ReleaseGil());
  module.def(
      "select_rows",
      [](int dtype, uintptr_t weight, uintptr_t scale, int64_t rows, int64_t cols, int64_t count,
         uintptr_t keep, uintptr_t pruned) {
        select_rows(scored(dtype, weight, scale, rows, cols), count, selection(keep, pruned));
      },
      ReleaseGil());
  module.def(
      "select_nm",
      [](int dtype, uintptr_t weight, uintptr_t scale, int64_t rows, int64_t cols, int n, int m,
         uintptr_t keep, uintptr_t pruned) {
        select_nm(scored(dtype, weight, scale, rows, cols), n, m, selection(keep, pruned));
      },
      ReleaseGil());
}

}  // namespace pysparse
