#include "bind.h"
#include "pysparse/shapley_draw.h"

namespace pysparse {
namespace {

DrawView drawn(uint64_t seed, uint64_t first, uint32_t visit, uint32_t purpose, int64_t rows,
               int64_t cols) {
  return {seed, first, visit, purpose, rows, cols};
}

}  // namespace

void bind_shapley(pybind11::module_& module) {
  module.attr("MAX_PLAYERS") = kMaxPlayers;
  module.def("philox", [](uint64_t key, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    uint32_t x[4] = {a, b, c, d};
    philox(key, x);
    return pybind11::make_tuple(x[0], x[1], x[2], x[3]);
  });
  module.def(
      "shapley_words",
      [](uint64_t seed, uint64_t first, uint32_t visit, uint32_t purpose, int64_t rows,
         int64_t cols, uintptr_t words) {
        draw_words(drawn(seed, first, visit, purpose, rows, cols), pointer<uint32_t>(words));
      },
      ReleaseGil());
  module.def(
      "shapley_permutations",
      [](uint64_t seed, uint64_t first, uint32_t visit, uint32_t purpose, int64_t rows,
         int64_t cols, uintptr_t orders) {
        draw_permutations(drawn(seed, first, visit, purpose, rows, cols), pointer<int32_t>(orders));
      },
      ReleaseGil());
}

}  // namespace pysparse
