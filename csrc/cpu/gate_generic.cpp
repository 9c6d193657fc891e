// y = activation(gate) * up, each activation by its definition in double: the oracle of the others.
#include <cmath>

#include "isa/generic.h"
#include "pysparse/fused.h"

namespace pysparse {
namespace {

double activate(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh:  // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
      return x / (1.0 + std::exp(-std::sqrt(8.0 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      break;
  }
  return x < 0.0 ? 0.0 : x;  // a NaN stays
}

template <class T>
void run(Activation activation, void* gate, const void* up, int64_t count) {
  T* values = static_cast<T*>(gate);
  for (int64_t i = 0; i < count; ++i) {
    T active;
    assign(active, static_cast<float>(activate(activation, to_float(values[i]))));
    assign(values[i], to_float(active) * to_float(static_cast<const T*>(up)[i]));
  }
}

constexpr GatedProduct::Kernel kFloat32{run<float>};
constexpr GatedProduct::Kernel kBFloat16{run<BFloat16>};
const Register<GatedProduct> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                             {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
