#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"
#include "pysparse/fused.h"
#include "pysparse/int8.h"

namespace pysparse {
namespace {
namespace py = pybind11;

// The arrays of a tiled int8 weight, as Python passes them: address and number of elements.
struct Int8Arrays {
  TiledInt8View view;
  Int8Sizes sizes;
};

using Array = std::pair<uintptr_t, int64_t>;

Int8Arrays arrays(const Array& values, const Array& masks, const Array& tile_offsets,
                  const Array& scales, const Array& row_sums, int64_t group_cols, int64_t rows,
                  int64_t cols) {
  const int64_t padded_rows = (rows + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t groups =
      group_cols > 0 ? std::max<int64_t>(1, (cols + group_cols - 1) / group_cols) : 1;
  return {{pointer<const int8_t>(values.first),
           pointer<const uint64_t>(masks.first),
           pointer<const int64_t>(tile_offsets.first),
           {pointer<const float>(scales.first), pointer<const int32_t>(row_sums.first), groups,
            group_cols, padded_rows},
           rows,
           cols},
          {values.second, masks.second, tile_offsets.second, scales.second, row_sums.second}};
}

void call_int8_linear(int dtype, uintptr_t x, int64_t tokens, int64_t cols, int parts,
                      const Array& values, const Array& masks, const Array& tile_offsets,
                      const Array& scales, const Array& row_sums, int64_t group_cols,
                      uintptr_t bias, uintptr_t y, int64_t rows) {
  const Int8Arrays weight =
      arrays(values, masks, tile_offsets, scales, row_sums, group_cols, rows, cols);
  int8_linear(weight.view, weight.sizes, pointer<const void>(x), tokens, parts,
              {pointer<void>(y), pointer<const void>(bias), rows, dtype_of(dtype)});
}

// values, masks, tile_offsets, scales, row_sums; columns of a group; bias; rows.
using Operand = std::tuple<Array, Array, Array, Array, Array, int64_t, uintptr_t, int64_t>;

// Int8 weights that are multiplied by the same input again and again: PreparedWeights' twin.
class PreparedInt8 {
 public:
  PreparedInt8(int dtype, int64_t cols, int parts, const std::vector<Operand>& operands)
      : dtype_(dtype_of(dtype)), parts_(parts) {
    for (const Operand& operand : operands) {
      const auto& [values, masks, offsets, scales, sums, group_cols, bias, rows] = operand;
      const Int8Arrays weight =
          arrays(values, masks, offsets, scales, sums, group_cols, rows, cols);
      weights_.push_back({weight.view, weight.sizes, pointer<const void>(bias)});
    }
  }

  void linear(uintptr_t x, int64_t tokens, uintptr_t y) const {
    check(weights_.size() == 1, "1 output for ", weights_.size(), " weights");
    const Int8Operand& one = weights_[0];
    int8_linear(one.weight, one.sizes, pointer<const void>(x), tokens, parts_,
                {pointer<void>(y), one.bias, one.weight.rows, dtype_});
  }

  void group(uintptr_t x, int64_t tokens, const std::vector<uintptr_t>& outputs) const {
    check(weights_.size() == outputs.size(), outputs.size(), " outputs for ", weights_.size(),
          " weights");
    std::vector<void*> targets;
    for (const uintptr_t address : outputs) targets.push_back(pointer<void>(address));
    int8_linear_group(weights_.data(), static_cast<int>(weights_.size()), call(x, tokens),
                      targets.data());
  }

  void gated(uintptr_t x, int64_t tokens, int activation, uintptr_t y) const {
    check(weights_.size() == 2, "a gate and an up weight, got ", weights_.size(), " weights");
    check(activation >= 0 && activation < kActivations, "unknown activation code ", activation);
    int8_gated_linear(weights_[0], weights_[1], static_cast<Activation>(activation),
                      call(x, tokens), pointer<void>(y));
  }

 private:
  QuantizedCall call(uintptr_t x, int64_t tokens) const {
    return {pointer<const void>(x), tokens, parts_, dtype_};
  }

  DType dtype_;
  int parts_;
  std::vector<Int8Operand> weights_;
};

void call_int8_unpack(int dtype, const Array& values, const Array& masks, const Array& tile_offsets,
                      const Array& scales, const Array& row_sums, int64_t group_cols,
                      int64_t all_rows, int64_t cols, int64_t first_tile, int64_t rows,
                      uintptr_t dense) {
  const Int8Arrays weight =
      arrays(values, masks, tile_offsets, scales, row_sums, group_cols, all_rows, cols);
  int8_unpack(weight.view, weight.sizes, first_tile, rows, dtype_of(dtype), pointer<void>(dense));
}

BitmapView map(int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets) {
  return {pointer<const uint8_t>(bitmask), pointer<const int64_t>(row_offsets), rows, cols};
}

}  // namespace

void bind_int8(pybind11::module_& module) {
  pybind11::class_<PreparedInt8>(module, "PreparedInt8")
      .def(pybind11::init<int, int64_t, int, const std::vector<Operand>&>())
      .def("linear", &PreparedInt8::linear, ReleaseGil())
      .def("group", &PreparedInt8::group, ReleaseGil())
      .def("gated", &PreparedInt8::gated, ReleaseGil());
  module.def("int8_linear", &call_int8_linear, ReleaseGil());
  module.def("int8_unpack", &call_int8_unpack, ReleaseGil());
  module.def(
      "int8_quantize",
      [](uintptr_t values, int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets,
         int64_t nnz, int64_t group_cols, uintptr_t quantized, uintptr_t scales,
         bool scales_given) {
        int8_quantize(pointer<const float>(values), map(rows, cols, bitmask, row_offsets), nnz,
                      group_cols, scales_given, pointer<int8_t>(quantized), pointer<float>(scales));
      },
      py::arg("values"), py::arg("rows"), py::arg("cols"), py::arg("bitmask"),
      py::arg("row_offsets"), py::arg("nnz"), py::arg("group_cols"), py::arg("quantized"),
      py::arg("scales"), py::arg("scales_given") = false, ReleaseGil());
  module.def(
      "int8_dequantize",
      [](uintptr_t quantized, uintptr_t scales, int64_t rows, int64_t cols, uintptr_t bitmask,
         uintptr_t row_offsets, int64_t nnz, int64_t group_cols, uintptr_t values) {
        int8_dequantize(pointer<const int8_t>(quantized), pointer<const float>(scales),
                        map(rows, cols, bitmask, row_offsets), nnz, group_cols,
                        pointer<float>(values));
      },
      ReleaseGil());
  module.def(
      "int8_tile_pack",
      [](uintptr_t values, int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets,
         int64_t nnz, int64_t group_cols, uintptr_t tiled, uintptr_t masks, uintptr_t tile_offsets,
         uintptr_t row_sums) {
        int8_tile_pack(pointer<const int8_t>(values), map(rows, cols, bitmask, row_offsets), nnz,
                       group_cols, pointer<int8_t>(tiled), pointer<uint64_t>(masks),
                       pointer<int64_t>(tile_offsets), pointer<int32_t>(row_sums));
      },
      ReleaseGil());
  module.def(
      "int8_tile_unpack",
      [](uintptr_t tiled, int64_t rows, int64_t cols, uintptr_t masks, uintptr_t tile_offsets,
         int64_t nnz, uintptr_t values, uintptr_t bitmask, uintptr_t row_offsets) {
        int8_tile_unpack(pointer<const int8_t>(tiled), rows, cols, pointer<const uint64_t>(masks),
                         pointer<const int64_t>(tile_offsets), nnz, pointer<int8_t>(values),
                         pointer<uint8_t>(bitmask), pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
}

}  // namespace pysparse
