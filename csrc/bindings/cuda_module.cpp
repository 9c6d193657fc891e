// The module _cuda: addresses and sizes in, an exception for any CUDA error out. See
// pysparse/_cuda.pyi.
#include <pybind11/stl.h>

#include <utility>

#include "cuda_bind.h"
#include "machine_code.h"
#include "versions.h"

namespace py = pybind11;

namespace pysparse::cuda {
namespace {

Product product(int dtype, uintptr_t x, int64_t tokens, int64_t cols, uintptr_t bias, uintptr_t y,
                int64_t rows) {
  return {pointer<const void>(x),        pointer<const void>(bias), pointer<void>(y),
          narrow_size(tokens, "tokens"), narrow_size(rows, "rows"), narrow_size(cols, "cols"),
          static_cast<DType>(dtype)};
}

Rows part(uintptr_t dense, int64_t first_row, int64_t rows, int64_t total_rows, int64_t cols) {
  if (first_row < 0 || rows < 0 || first_row > total_rows || rows > total_rows - first_row)
    throw std::invalid_argument(std::to_string(rows) + " rows from row " +
                                std::to_string(first_row) + " on are outside a matrix with " +
                                std::to_string(total_rows));
  return {pointer<void>(dense), narrow_size(first_row, "first_row"), narrow_size(rows, "rows"),
          narrow_size(total_rows, "total_rows"), narrow_size(cols, "cols")};
}

StripWeight strips(int packing, uintptr_t stream, uintptr_t offsets, int64_t largest_block) {
  return {pointer<const uint8_t>(stream), pointer<const int32_t>(offsets),
          narrow_size(largest_block, "largest_block"), static_cast<Packing>(packing)};
}

constexpr int64_t kStripTokens = 64;  // as strip.cuh has it, which only nvcc reads

int64_t workspace_floats(int packing, int dtype, int64_t tokens, int64_t cols, int64_t rows,
                         int64_t largest_block, int device) {
  if (tokens < 1 || tokens > kStripTokens)
    throw std::invalid_argument("tokens is " + std::to_string(tokens) +
                                ", strip kernels take 1 to " + std::to_string(kStripTokens));
  const int64_t floats = strip_workspace(strips(packing, 0, 0, largest_block),
                                         product(dtype, 0, tokens, cols, 0, 0, rows), device);
  if (floats < 0)
    throw std::runtime_error(
        "device " + std::to_string(device) +
        " does not answer; CUDA devices that the driver shows: " + std::to_string(device_count()));
  return floats;
}

}  // namespace
}  // namespace pysparse::cuda

PYBIND11_MODULE(_cuda, module) {
  using namespace pysparse::cuda;
  module.doc() = "CUDA kernels of pysparse; see pysparse/_cuda.pyi";
  module.attr("SOURCE_HASHES") = py::dict(
      py::arg("delta") = PYSPARSE_HASH_DELTA, py::arg("fragment") = PYSPARSE_HASH_FRAGMENT,
      py::arg("pair") = PYSPARSE_HASH_PAIR, py::arg("nm") = PYSPARSE_HASH_NM,
      py::arg("attention") = PYSPARSE_HASH_ATTENTION,
      py::arg("embedding") = PYSPARSE_HASH_EMBEDDING, py::arg("shapley") = PYSPARSE_HASH_SHAPLEY,
      py::arg("pruning") = PYSPARSE_HASH_PRUNING);
  module.attr("ARCHITECTURES") = PYSPARSE_CUDA_ARCH_LIST;
  module.def("device_count", device_count);
  module.def("shared_bytes", shared_bytes);
  module.def("versions", [] {
    const Versions found = versions();
    return std::make_pair(found.driver, found.runtime);
  });
  module.def("load_code", [](const py::bytes& image, int device) {
    int kernels = 0;
    check(load_code(PyBytes_AS_STRING(image.ptr()), device, &kernels), "load_code");
    return kernels;
  });
  module.def(
      "delta_linear", [](int dtype, uintptr_t x, int64_t tokens, int64_t cols, uintptr_t values,
                         uintptr_t deltas, uintptr_t row_groups, uintptr_t chunk_cols,
                         uintptr_t bias, uintptr_t y, int64_t rows, int device, uintptr_t stream) {
        const DeltaWeight weight{pointer<const void>(values), pointer<const uint32_t>(deltas),
                                 pointer<const int32_t>(row_groups),
                                 pointer<const int32_t>(chunk_cols)};
        check(delta_linear(weight, product(dtype, x, tokens, cols, bias, y, rows),
                           {device, pointer<void>(stream)}),
              "delta_linear");
      });
  module.def(
      "delta_unpack", [](uintptr_t values, uintptr_t deltas, uintptr_t row_groups,
                         uintptr_t chunk_cols, uintptr_t dense, int64_t first_row, int64_t rows,
                         int64_t total_rows, int64_t cols, int device, uintptr_t stream) {
        const DeltaWeight weight{pointer<const void>(values), pointer<const uint32_t>(deltas),
                                 pointer<const int32_t>(row_groups),
                                 pointer<const int32_t>(chunk_cols)};
        check(delta_unpack(weight, part(dense, first_row, rows, total_rows, cols),
                           {device, pointer<void>(stream)}),
              "delta_unpack");
      });
  module.def("nm_linear", [](int dtype, uintptr_t x, int64_t tokens, int64_t cols, uintptr_t values,
                             uintptr_t places, int n, int bits, uintptr_t bias, uintptr_t y,
                             int64_t rows, int device, uintptr_t stream) {
    const NmWeight weight{pointer<const void>(values), pointer<const uint8_t>(places), n, bits};
    check(nm_linear(weight, product(dtype, x, tokens, cols, bias, y, rows),
                    {device, pointer<void>(stream)}),
          "nm_linear");
  });
  module.def("nm_unpack", [](uintptr_t values, uintptr_t places, int n, int bits, uintptr_t dense,
                             int64_t first_row, int64_t rows, int64_t total_rows, int64_t cols,
                             int device, uintptr_t stream) {
    const NmWeight weight{pointer<const void>(values), pointer<const uint8_t>(places), n, bits};
    check(nm_unpack(weight, part(dense, first_row, rows, total_rows, cols),
                    {device, pointer<void>(stream)}),
          "nm_unpack");
  });
  module.def("strip_workspace", workspace_floats);
  module.def("strip_linear",
             [](int packing, int dtype, uintptr_t x, int64_t tokens, int64_t cols,
                uintptr_t weights, uintptr_t offsets, int64_t largest_block, uintptr_t bias,
                uintptr_t y, int64_t rows, uintptr_t workspace, int device, uintptr_t stream) {
               check(strip_linear(strips(packing, weights, offsets, largest_block),
                                  product(dtype, x, tokens, cols, bias, y, rows),
                                  pointer<float>(workspace), {device, pointer<void>(stream)}),
                     packing == 0 ? "fragment_linear" : "pair_linear");
             });
  module.def("strip_unpack", [](int packing, uintptr_t weights, uintptr_t offsets, uintptr_t dense,
                                int64_t first_row, int64_t rows, int64_t total_rows, int64_t cols,
                                int device, uintptr_t stream) {
    if (first_row % 16)
      throw std::invalid_argument("strips start at multiples of 16 rows, got row " +
                                  std::to_string(first_row));
    check(strip_unpack(strips(packing, weights, offsets, 0),
                       part(dense, first_row, rows, total_rows, cols),
                       {device, pointer<void>(stream)}),
          packing == 0 ? "fragment_unpack" : "pair_unpack");
  });
  bind_attention(module);
  bind_embedding(module);
  bind_pruning(module);
  bind_shapley(module);
}
