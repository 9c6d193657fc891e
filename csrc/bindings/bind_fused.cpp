#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "bind.h"
#include "pysparse/fused.h"
#include "pysparse/linear.h"

namespace pysparse {
namespace {

// values, masks, tile_offsets, each with its number of entries; bias; rows.
using Operand =
    std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, int64_t>;

BitmapOperand operand_of(const Operand& operand, int64_t cols, DType dtype) {
  const auto& [values, value_count, masks, mask_count, offsets, offset_count, bias, rows] = operand;
  return {{pointer<const void>(values), pointer<const uint32_t>(masks),
           pointer<const int64_t>(offsets), rows, cols, dtype},
          {value_count, mask_count, offset_count},
          pointer<const void>(bias)};
}

void call_bitmap_linear_group(int dtype, uintptr_t x, int64_t tokens, int64_t cols,
                              const std::vector<Operand>& operands,
                              const std::vector<uintptr_t>& outputs) {
  check(operands.size() == outputs.size(), operands.size(), " weights, but ", outputs.size(),
        " outputs");
  std::vector<BitmapOperand> weights;
  std::vector<void*> targets;
  for (const Operand& operand : operands)
    weights.push_back(operand_of(operand, cols, dtype_of(dtype)));
  for (const uintptr_t address : outputs) targets.push_back(pointer<void>(address));
  bitmap_linear_group(weights.data(), static_cast<int>(weights.size()), pointer<const void>(x),
                      tokens, targets.data());
}

void call_bitmap_gated_linear(int dtype, uintptr_t x, int64_t tokens, int64_t cols,
                              const Operand& gate, const Operand& up, int activation, uintptr_t y) {
  check(activation >= 0 && activation < kActivations, "unknown activation code ", activation);
  const DType type = dtype_of(dtype);
  bitmap_gated_linear(operand_of(gate, cols, type), operand_of(up, cols, type),
                      static_cast<Activation>(activation), pointer<const void>(x), tokens,
                      pointer<void>(y));
}

// Weights that are multiplied by the same input again and again, so that a call passes the
// addresses of inputs and outputs alone. Their arrays must outlive it; each call checks their sizes
// anew.
class PreparedWeights {
 public:
  PreparedWeights(int dtype, int64_t cols, const std::vector<Operand>& operands) {
    for (const Operand& operand : operands)
      weights_.push_back(operand_of(operand, cols, dtype_of(dtype)));
  }

  void linear(uintptr_t x, int64_t tokens, uintptr_t y) const {
    check(weights_.size() == 1, "1 output for ", weights_.size(), " weights");
    const BitmapOperand& one = weights_[0];
    bitmap_linear(one.weight, one.sizes, pointer<const void>(x), tokens,
                  {pointer<void>(y), one.bias, one.weight.rows, one.weight.dtype});
  }

  void group(uintptr_t x, int64_t tokens, const std::vector<uintptr_t>& outputs) const {
    check(weights_.size() == outputs.size(), outputs.size(), " outputs for ", weights_.size(),
          " weights");
    std::vector<void*> targets;
    for (const uintptr_t address : outputs) targets.push_back(pointer<void>(address));
    bitmap_linear_group(weights_.data(), static_cast<int>(weights_.size()), pointer<const void>(x),
                        tokens, targets.data());
  }

  void gated(uintptr_t x, int64_t tokens, int activation, uintptr_t y) const {
    check(weights_.size() == 2, "a gate and an up weight, got ", weights_.size(), " weights");
    check(activation >= 0 && activation < kActivations, "unknown activation code ", activation);
    bitmap_gated_linear(weights_[0], weights_[1], static_cast<Activation>(activation),
                        pointer<const void>(x), tokens, pointer<void>(y));
  }

 private:
  std::vector<BitmapOperand> weights_;
};

}  // namespace

void bind_fused(pybind11::module_& module) {
  pybind11::class_<PreparedWeights>(module, "PreparedWeights")
      .def(pybind11::init<int, int64_t, const std::vector<Operand>&>())
      .def("linear", &PreparedWeights::linear, ReleaseGil())
      .def("group", &PreparedWeights::group, ReleaseGil())
      .def("gated", &PreparedWeights::gated, ReleaseGil());
  module.def("bitmap_linear_group", &call_bitmap_linear_group, ReleaseGil());
  module.def("bitmap_gated_linear", &call_bitmap_gated_linear, ReleaseGil());
}

}  // namespace pysparse
