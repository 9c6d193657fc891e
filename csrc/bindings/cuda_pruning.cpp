// Pruning kernels of _cuda: a matrix is its entries' type, two addresses and its shape; rows are
// contiguous.
#include <pybind11/stl.h>

#include <array>

#include "cuda_bind.h"
#include "pruning.h"

namespace pysparse::cuda {
namespace {

using Matrix = std::array<int64_t, 4>;      // addresses of weight and scale, rows, cols
using Results = std::array<uintptr_t, 3>;   // keep, pruned, damage
using Operands = std::array<uintptr_t, 6>;  // weight, upper, scale, keep, errors, damage

ScoredMatrix matrix_of(int entry, const Matrix& matrix) {
  const auto [weight, scale, rows, cols] = matrix;
  return {pointer<const void>(static_cast<uintptr_t>(weight)),
          pointer<const float>(static_cast<uintptr_t>(scale)),
          rows,
          cols,
          cols,
          static_cast<Entry>(entry)};
}

Chosen chosen_of(const Results& at, const Matrix& matrix) {
  return {pointer<uint8_t>(at[0]), pointer<void>(at[1]), matrix[3]};
}

}  // namespace

void bind_pruning(pybind11::module_& module) {
  module.attr("OBS_STRIP") = kObsStrip;
  module.def("select_rows", [](int entry, const Matrix& matrix, int64_t count, bool joint,
                               const Results& at, int device, uintptr_t stream) {
    check(select_rows(matrix_of(entry, matrix), count, joint, chosen_of(at, matrix),
                      pointer<Damage>(at[2]), {device, pointer<void>(stream)}),
          "select_rows");
  });
  module.def("select_nm", [](int entry, const Matrix& matrix, int n, int m, const Results& at,
                             int device, uintptr_t stream) {
    check(select_nm(matrix_of(entry, matrix), n, m, chosen_of(at, matrix), pointer<Damage>(at[2]),
                    {device, pointer<void>(stream)}),
          "select_nm");
  });
  module.def("obs_sweep", [](const Operands& at, const std::array<int64_t, 3>& sizes, bool joint,
                             const std::vector<int64_t>& counts, int n, int m, int device,
                             uintptr_t stream) {
    const auto [rows, cols, block] = sizes;
    if (block < 1 || (n == 0 && static_cast<int64_t>(counts.size()) != (cols + block - 1) / block))
      throw std::invalid_argument(std::to_string(counts.size()) + " counts for blocks of " +
                                  std::to_string(block) + " of " + std::to_string(cols) +
                                  " columns");
    const ObsSweep sweep{pointer<float>(at[0]),
                         pointer<const float>(at[1]),
                         pointer<const float>(at[2]),
                         pointer<uint8_t>(at[3]),
                         rows,
                         cols,
                         block,
                         joint,
                         counts.data(),
                         n,
                         m};
    check(obs_sweep(sweep, pointer<float>(at[4]), pointer<Damage>(at[5]),
                    {device, pointer<void>(stream)}),
          "obs_sweep");
  });
}

}  // namespace pysparse::cuda
