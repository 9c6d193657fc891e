#include "bind.h"
#include "pysparse/select.h"

namespace pysparse {
namespace {

ScoredView scored(int dtype, uintptr_t weight, uintptr_t scale, int64_t rows, int64_t cols) {
  return {pointer<const void>(weight), pointer<const float>(scale), rows, cols, dtype_of(dtype)};
}

Selection selection(uintptr_t keep, uintptr_t pruned) {
  return {pointer<uint8_t>(keep), pointer<void>(pruned)};
}

}  // namespace

void bind_pruning(pybind11::module_& module) {
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
