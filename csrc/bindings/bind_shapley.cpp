#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <utility>

#include "bind.h"
#include "pysparse/shapley_draw.h"
#include "pysparse/shapley_heads.h"

namespace pysparse {
namespace {

DrawView drawn(uint64_t seed, uint64_t first, uint32_t visit, uint32_t purpose, int64_t rows,
               int64_t cols) {
  return {seed, first, visit, purpose, rows, cols};
}

using Addresses = std::array<uintptr_t, 5>;
using Shape = std::tuple<int64_t, int64_t, int, int>;  // rows, samples, fields, cols
using Draw = std::tuple<uint64_t, uint64_t, uint32_t, bool, bool, bool, uintptr_t>;

EntrySamples samples_of(const Addresses& at, const Shape& shape) {
  const auto [rows, samples, fields, cols] = shape;
  return {pointer<const float>(at[0]),
          pointer<const float>(at[1]),
          pointer<const int32_t>(at[2]),
          pointer<const float>(at[3]),
          pointer<const float>(at[4]),
          rows,
          samples,
          fields,
          cols};
}

EntryDraw draw_of(const Draw& draw) {
  const auto [seed, first, visit, antithetic, whole_rows, twice, orders] = draw;
  return {seed, first, visit, antithetic, whole_rows, twice, pointer<const int32_t>(orders)};
}

EntryTotals totals_of(const Addresses& at) {
  return {pointer<int64_t>(at[0]), pointer<int64_t>(at[1]), pointer<int32_t>(at[2]),
          pointer<int32_t>(at[3]), pointer<double>(at[4])};
}

using Array = std::pair<uintptr_t, int64_t>;  // an address and the number of entries
using HeadShape = std::tuple<bool, int, int64_t, int64_t, int64_t>;

FloatArray floats_of(const Array& array) {
  return {pointer<const float>(array.first), array.second};
}

// arrays: mlp, cross_weight, cross_bias, gates, cross_out
HeadView head_of(const HeadShape& shape, const Array& widths, const std::array<Array, 5>& arrays) {
  const auto [pairs, cross, crosses, experts, rank] = shape;
  check(cross >= 0 && cross <= 2, "unknown kind of cross layers ", cross);
  return {pairs,
          static_cast<Cross>(cross),
          crosses,
          experts,
          rank,
          pointer<const int64_t>(widths.first),
          widths.second,
          floats_of(arrays[0]),
          floats_of(arrays[1]),
          floats_of(arrays[2]),
          floats_of(arrays[3]),
          floats_of(arrays[4])};
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
  module.def(
      "shapley_fm",
      [](const Addresses& samples, const Shape& shape, const Draw& draw, const Addresses& totals) {
        fm_shapley(samples_of(samples, shape), draw_of(draw), totals_of(totals));
      },
      ReleaseGil());
  module.def(
      "shapley_fm_marginals",
      [](const Addresses& samples, const Shape& shape, const Draw& draw, uintptr_t marginals) {
        fm_marginals(samples_of(samples, shape), draw_of(draw), pointer<float>(marginals));
      },
      ReleaseGil());
  module.def(
      "shapley_head",
      [](const Addresses& samples, const Shape& shape, const Draw& draw, const HeadShape& head,
         const Array& widths, const std::array<Array, 5>& arrays, const Addresses& totals) {
        head_shapley(samples_of(samples, shape), draw_of(draw), head_of(head, widths, arrays),
                     totals_of(totals));
      },
      ReleaseGil());
  module.def(
      "shapley_head_marginals",
      [](const Addresses& samples, const Shape& shape, const Draw& draw, const HeadShape& head,
         const Array& widths, const std::array<Array, 5>& arrays, uintptr_t marginals) {
        head_marginals(samples_of(samples, shape), draw_of(draw), head_of(head, widths, arrays),
                       pointer<float>(marginals));
      },
      ReleaseGil());
}

}  // namespace pysparse
