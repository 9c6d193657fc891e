// Ridge problems one row at a time, in double: the oracle.
#include <cmath>

#include "isa/generic.h"
#include "pysparse/ridge.h"

namespace pysparse {
namespace {

// The lower triangle of L, then a column of L^-1.
size_t scratch_bytes(int padded) {
  const auto n = static_cast<size_t>(padded);
  return (n * n + n) * sizeof(double);
}

void factor(const RidgeView& view, const float* d, double* l) {
  const int n = view.size;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = double{d[i]} * view.gram[i * view.padded + j] * d[j] + (i == j);
      for (int k = 0; k < j; ++k) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i == j ? std::sqrt(sum) : sum / l[j * n + j];
    }
  }
}

// x <- L^-1 x, from its first non-zero entry on.
void forward(const double* l, int n, int first, double* x) {
  for (int i = first; i < n; ++i) {
    for (int k = first; k < i; ++k) x[i] -= l[i * n + k] * x[k];
    x[i] /= l[i * n + i];
  }
}

void backward(const double* l, int n, double* x) {
  for (int i = n - 1; i >= 0; --i) {
    for (int k = i + 1; k < n; ++k) x[i] -= l[k * n + i] * x[k];
    x[i] /= l[i * n + i];
  }
}

void run(const RidgeView& view, int64_t begin, int64_t end, void* scratch) {
  const int n = view.size;
  auto* l = static_cast<double*>(scratch);
  double* x = l + static_cast<ptrdiff_t>(n) * n;
  for (int64_t r = begin; r < end; ++r) {
    const float* d = view.scale + r * n;
    factor(view, d, l);
    for (int j = 0; j < n; ++j) {
      for (int i = j; i < n; ++i) x[i] = i == j;
      forward(l, n, j, x);
      double norm = 0;
      for (int i = j; i < n; ++i) norm += x[i] * x[i];
      view.inverse_diagonal[r * n + j] = static_cast<float>(norm);
    }
    for (int i = 0; i < n; ++i) x[i] = double{d[i]} * view.target[r * n + i];
    forward(l, n, 0, x);
    backward(l, n, x);
    for (int i = 0; i < n; ++i) view.solution[r * n + i] = static_cast<float>(d[i] * x[i]);
  }
}

constexpr RidgeRows::Kernel kKernel{scratch_bytes, run};
const Register<RidgeRows> registered{DType::kFloat32, isa::kGeneric, kKernel};

}  // namespace
}  // namespace pysparse
