#include "bind.h"
#include "pysparse/lowrank.h"

namespace pysparse {
namespace {

LowRankView view_of(uintptr_t bitmask, uintptr_t row_offsets, int64_t rows, int64_t cols,
                    uintptr_t values, uintptr_t up, uintptr_t down, int64_t rank, float scale) {
  return {{pointer<const uint8_t>(bitmask), pointer<const int64_t>(row_offsets), rows, cols},
          pointer<const float>(values),
          pointer<const float>(up),
          pointer<const float>(down),
          rank,
          scale};
}

}  // namespace

void bind_lowrank(pybind11::module_& module) {
  pybind11::class_<LowRankView>(module, "LowRankView").def(pybind11::init(&view_of));
  module.def(
      "lowrank_expand",
      [](const LowRankView& view, int dtype, int64_t begin, int64_t end, uintptr_t tile) {
        lowrank_expand(view, dtype_of(dtype), begin, end, pointer<void>(tile));
      },
      ReleaseGil());
  module.def(
      "lowrank_contract",
      [](const LowRankView& view, int dtype, uintptr_t gradient, int64_t begin, int64_t end,
         uintptr_t up, uintptr_t down, uintptr_t values) {
        lowrank_contract(view, dtype_of(dtype), pointer<const void>(gradient), begin, end,
                         pointer<float>(up), pointer<float>(down), pointer<float>(values));
      },
      ReleaseGil());
}

}  // namespace pysparse
