// softmax(scale q k^T) v of single rows by its definition in double: the oracle of the others.
#include <algorithm>
#include <cmath>

#include "isa/generic.h"
#include "pysparse/row_attention.h"

namespace pysparse {
namespace {

// The logits, then the weights that they make; returns the weights' sum.
template <class T>
double weigh(const RowHeads& h, const T* query, float* weights) {
  double largest = -INFINITY, sum = 0.0;
  for (int64_t t = 0; t < h.keys; ++t) {
    const T* key = static_cast<const T*>(h.k) + t * h.k_stride;
    double logit = 0.0;
    for (int64_t d = 0; d < h.dim; ++d) logit += double{to_float(query[d])} * to_float(key[d]);
    weights[t] = static_cast<float>(logit * h.scale);
    largest = std::max<double>(largest, weights[t]);
  }
  for (int64_t t = 0; t < h.keys; ++t) {
    weights[t] = static_cast<float>(std::exp(weights[t] - largest));
    sum += weights[t];
  }
  return sum;
}

template <class T>
void run(const RowHeads& h, float* scratch) {
  for (int64_t head = 0; head < h.heads; ++head) {
    const double sum = weigh(h, static_cast<const T*>(h.q) + head * h.q_stride, scratch);
    T* out = static_cast<T*>(h.out) + head * h.value_dim;
    for (int64_t d = 0; d < h.value_dim; ++d) {
      double total = 0.0;
      for (int64_t t = 0; t < h.keys; ++t)
        total += double{scratch[t]} * to_float(static_cast<const T*>(h.v)[t * h.v_stride + d]);
      assign(out[d], static_cast<float>(total / sum));
    }
  }
}

constexpr RowAttention::Kernel kFloat32{run<float>};
constexpr RowAttention::Kernel kBFloat16{run<BFloat16>};
const Register<RowAttention> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                             {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
