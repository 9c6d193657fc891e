#pragma once
// What the factor of a Hessian is made of: a product whose sums have one order whatever the number
// of threads, and the inverse Cholesky factor of a small matrix.
#include "pysparse/kernel_table.h"

namespace pysparse {

struct ProductAdd {
  static constexpr const char* op = "product";
  static constexpr const char* format = "dense";
  static constexpr int kDepth = 256;  // of a panel: with 64 columns 64 KB, in the L2 cache
  struct Kernel {
    int width;  // columns of a panel
    // c[r][0, live) += alpha * sum over k of a[r][k] * panel[k][.], panel[depth][width] being
    // padded by zeros and aligned to 64 bytes.
    void (*run)(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* panel,
                int64_t rows, int depth, float alpha, int live);
  };
};

struct StridedView {
  const float* values;
  int64_t rows, cols, row_stride, col_stride;
};

// c += alpha * a b; the columns of a and of c lie side by side.
void add_product(float* c, int64_t c_stride, const StridedView& a, const StridedView& b,
                 float alpha);

inline constexpr int64_t kLeaf = 64;
// Replaces the lower triangle of a matrix L L^T, up to kLeaf wide, by L^-1 and the rest by zeros;
// computed in double. False, and nothing is written, when it is not positive definite.
bool inverse_cholesky_leaf(float* matrix, int64_t size, int64_t stride);

}  // namespace pysparse
