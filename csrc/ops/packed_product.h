#pragma once
// Rows times a fixed weight, packed once into the panels of the product kernel.
#include <algorithm>
#include <cstdint>

#include "pysparse/cholesky.h"
#include "pysparse/scratch.h"

namespace pysparse {

class PackedProduct {
 public:
  // Packs w(k, c), k below `depth` and c below `cols`.
  template <class Weight>
  PackedProduct(int64_t depth, int64_t cols, const Weight& w)
      : kernel_(lookup<ProductAdd>(DType::kFloat32)), depth_(depth), cols_(cols) {
    const int64_t panels = (cols + kernel_.width - 1) / kernel_.width;
    panels_ = static_cast<float*>(
        memory_.reserve(static_cast<size_t>(panels * depth * kernel_.width) * sizeof(float)));
    float* at = panels_;
    for (int64_t first = 0; first < cols; first += kernel_.width)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t c = first; c < first + kernel_.width; ++c) *at++ = c < cols ? w(k, c) : 0.0f;
  }
  PackedProduct(PackedProduct&&) = default;

  // out[rows][out_stride] = in[rows][in_stride] w
  void run(const float* in, int64_t in_stride, int64_t rows, float* out, int64_t out_stride) const {
    for (int64_t r = 0; r < rows; ++r) std::fill_n(out + r * out_stride, cols_, 0.0f);
    for (int64_t first = 0; first < cols_; first += kernel_.width)
      for (int64_t k = 0; k < depth_; k += ProductAdd::kDepth)
        kernel_.run(out + first, out_stride, in + k, in_stride,
                    panels_ + first * depth_ + k * kernel_.width, rows,
                    static_cast<int>(std::min<int64_t>(ProductAdd::kDepth, depth_ - k)), 1.0f,
                    static_cast<int>(std::min<int64_t>(kernel_.width, cols_ - first)));
  }
  int64_t cols() const { return cols_; }

 private:
  const ProductAdd::Kernel& kernel_;
  int64_t depth_, cols_;
  Scratch memory_;
  float* panels_;
};

}  // namespace pysparse
