// The product panel by panel, and small inverse Cholesky factors.
#include "pysparse/cholesky.h"

#include <cmath>

#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {
namespace {

// Rows [begin, begin + depth) and `live` columns of b, padded by zeros to `width` columns.
void pack(const StridedView& b, int64_t begin, int64_t depth, int64_t col, int live, int width,
          float* panel) {
  std::fill(panel, panel + depth * width, 0.0f);
  const float* from = b.values + begin * b.row_stride + col * b.col_stride;
  if (b.row_stride == 1) {
    for (int c = 0; c < live; ++c)
      for (int64_t k = 0; k < depth; ++k) panel[k * width + c] = from[c * b.col_stride + k];
    return;
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int c = 0; c < live; ++c) panel[k * width + c] = from[k * b.row_stride + c * b.col_stride];
}

struct Block {
  Range rows, panels;
};

Block share_of(int64_t rows, int64_t panels, int thread, int threads) {
  if (panels >= threads && panels * ProductAdd::kDepth >= rows)
    return {{0, rows}, even_share(panels, thread, threads)};
  return {even_share(rows, thread, threads), {0, panels}};
}

}  // namespace

void add_product(float* c, int64_t c_stride, const StridedView& a, const StridedView& b,
                 float alpha) {
  check(a.cols == b.rows, "a product of [", a.rows, ", ", a.cols, "] and [", b.rows, ", ", b.cols,
        "]");
  check(a.rows >= 0 && a.cols >= 0 && b.cols >= 0 && a.col_stride == 1,
        "the columns of the left matrix must lie side by side, got stride ", a.col_stride);
  const auto& kernel = lookup<ProductAdd>(DType::kFloat32);
  const int64_t panels = (b.cols + kernel.width - 1) / kernel.width;
  parallel(threads_for(a.rows * a.cols * b.cols / 8), [&](int thread, int threads) {
    thread_local Scratch scratch;
    auto* panel = static_cast<float*>(
        scratch.reserve(size_t{ProductAdd::kDepth} * static_cast<size_t>(kernel.width) * 4));
    const Block share = share_of(a.rows, panels, thread, threads);
    for (int64_t p = share.panels.begin; p < share.panels.end; ++p) {
      const int64_t col = p * kernel.width;
      const int live = static_cast<int>(std::min<int64_t>(kernel.width, b.cols - col));
      for (int64_t k = 0; k < a.cols; k += ProductAdd::kDepth) {
        const int64_t depth = std::min<int64_t>(ProductAdd::kDepth, a.cols - k);
        pack(b, k, depth, col, live, kernel.width, panel);
        kernel.run(c + share.rows.begin * c_stride + col, c_stride,
                   a.values + share.rows.begin * a.row_stride + k, a.row_stride, panel,
                   share.rows.end - share.rows.begin, static_cast<int>(depth), alpha, live);
      }
    }
  });
}

bool inverse_cholesky_leaf(float* matrix, int64_t size, int64_t stride) {
  check(size >= 0 && size <= kLeaf, "a leaf has up to ", kLeaf, " columns, got ", size);
  double lower[kLeaf][kLeaf] = {}, inverse[kLeaf][kLeaf] = {};
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double sum = matrix[i * stride + j];
      for (int64_t k = 0; k < j; ++k) sum -= lower[i][k] * lower[j][k];
      if (i == j && !(sum > 0 && std::isfinite(sum))) return false;
      lower[i][j] = i == j ? std::sqrt(sum) : sum / lower[j][j];
    }
  }
  for (int64_t j = 0; j < size; ++j) {
    inverse[j][j] = 1 / lower[j][j];
    for (int64_t i = j + 1; i < size; ++i) {
      double sum = 0;
      for (int64_t k = j; k < i; ++k) sum -= lower[i][k] * inverse[k][j];
      inverse[i][j] = sum / lower[i][i];
    }
  }
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < size; ++j) matrix[i * stride + j] = static_cast<float>(inverse[i][j]);
  return true;
}

}  // namespace pysparse
