// c += alpha * a b, in double within a panel: the oracle.
#include "isa/generic.h"
#include "pysparse/cholesky.h"

namespace pysparse {
namespace {

constexpr int kWidth = 16;

void run(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* panel,
         int64_t rows, int depth, float alpha, int live) {
  for (int64_t r = 0; r < rows; ++r) {
    double sums[kWidth] = {};
    for (int k = 0; k < depth; ++k)
      for (int i = 0; i < kWidth; ++i)
        sums[i] += double{a[r * a_stride + k]} * panel[k * kWidth + i];
    for (int i = 0; i < live; ++i)
      c[r * c_stride + i] = static_cast<float>(c[r * c_stride + i] + alpha * sums[i]);
  }
}

constexpr ProductAdd::Kernel kKernel{kWidth, run};
const Register<ProductAdd> registered{DType::kFloat32, isa::kGeneric, kKernel};

}  // namespace
}  // namespace pysparse
