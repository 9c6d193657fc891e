// Shapley kernels of _cuda: random orders, walks of factorisation machines, exact sums.
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "cuda_bind.h"
#include "shapley.h"

namespace pysparse::cuda {
namespace {

// seed, first, visit, purpose, rows, cols
using Draw = std::tuple<uint64_t, uint64_t, uint32_t, uint32_t, int64_t, int64_t>;
using Addresses = std::array<uintptr_t, 5>;  // table, base, ids, offset, labels
using Shape = std::array<int64_t, 3>;        // samples, fields, cols
using Orders = std::tuple<uint64_t, uint64_t, uint32_t, bool, uintptr_t>;

ShapleyDraw draw_of(const Draw& draw) {
  const auto [seed, first, visit, purpose, rows, cols] = draw;
  return {seed, first, visit, purpose, rows, cols};
}

FmSamples samples_of(const Addresses& at, const Shape& shape) {
  return {pointer<const float>(at[0]),     pointer<const float>(at[1]),
          pointer<const int32_t>(at[2]),   pointer<const float>(at[3]),
          pointer<const float>(at[4]),     shape[0],
          narrow_size(shape[1], "fields"), narrow_size(shape[2], "cols")};
}

FmOrders orders_of(const Orders& orders) {
  const auto [seed, first, visit, antithetic, given] = orders;
  return {seed, first, visit, antithetic, pointer<const int32_t>(given)};
}

}  // namespace

void bind_shapley(pybind11::module_& module) {
  module.def("shapley_words", [](const Draw& draw, uintptr_t words, int device, uintptr_t stream) {
    check(shapley_words(draw_of(draw), pointer<uint32_t>(words), {device, pointer<void>(stream)}),
          "shapley_words");
  });
  module.def("shapley_permutations", [](const Draw& draw, uintptr_t room, uintptr_t orders,
                                        int device, uintptr_t stream) {
    check(shapley_permutations(draw_of(draw), pointer<uint32_t>(room), pointer<int32_t>(orders),
                               {device, pointer<void>(stream)}),
          "shapley_permutations");
  });
  module.def("fm_walk_bytes", fm_walk_bytes);
  module.def("fm_marginals", [](const Addresses& at, const Shape& shape, const Orders& orders,
                                uintptr_t marginals, uintptr_t peak, int device, uintptr_t stream) {
    check(fm_marginals(samples_of(at, shape), orders_of(orders), pointer<float>(marginals),
                       pointer<uint32_t>(peak), {device, pointer<void>(stream)}),
          "fm_marginals");
  });
  module.def("add_marginals", [](uintptr_t marginals, uintptr_t ids, const Shape& shape,
                                 uintptr_t sums, uintptr_t squares, int device, uintptr_t stream) {
    check(add_marginals(pointer<const float>(marginals), pointer<const int32_t>(ids), shape[0],
                        narrow_size(shape[1], "fields"), narrow_size(shape[2], "cols"),
                        {pointer<int64_t>(sums), pointer<int64_t>(squares)},
                        {device, pointer<void>(stream)}),
          "add_marginals");
  });
}

}  // namespace pysparse::cuda
