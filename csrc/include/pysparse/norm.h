#pragma once
// RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): each row over its root mean square, times a
// weight.
#include <cstdint>

#include "pysparse/kernel_table.h"

namespace pysparse {

// Where models of transformers round x / rms(x) and what they multiply it by.
enum class NormForm : int {
  kRounded = 0,  // to the input's type before the product with the weight: Llama, Qwen, Mistral, T5
  kWide = 1,     // once, after the product: OLMo 2
  kShifted = 2,  // once, after the product with 1 + weight: Gemma
};
inline constexpr int kNormForms = 3;

struct NormView {
  const void* weight;  // [cols]
  int64_t cols;
  float eps;
  NormForm form;
  DType dtype;  // of weight, input and output
};

// 1 / sqrt(mean of squares + eps) is computed by the float32 operations of the eager code, but for
// the sum, which is a double's: whatever the order, its rounding to float32 is as good as certain,
// so all levels find the same bits.
struct RmsNorm {
  static constexpr const char* op = "norm";
  static constexpr const char* format = "dense";
  struct Kernel {
    void (*run)(const NormView& norm, const void* x, int64_t rows, void* y);  // [rows][cols]
  };
};

// y = x / sqrt(mean(x^2) + eps) * weight, row by row; y may be x.
void rms_norm(const NormView& norm, const void* x, int64_t rows, void* y);

}  // namespace pysparse
