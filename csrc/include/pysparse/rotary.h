#pragma once
// Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split form of transformers:
// dimension i turns with dimension i + dim / 2.
#include "pysparse/attention.h"

namespace pysparse {

// The heads of one position.
struct RotaryHeads {
  const void* x;
  void* y;
  int64_t x_stride, y_stride;  // elements between heads
  int64_t heads, dim;          // dim is even
  const void* cosine;          // [dim]
  const void* sine;            // [dim]
};

struct Rotary {
  static constexpr const char* op = "rotary";
  static constexpr const char* format = "dense";
  struct Kernel {
    // y = x cos + (-x[dim / 2..], x[..dim / 2]) sin: both products are rounded to the type, and
    // their sum again, as the eager code's operations round. So all levels have its bits.
    void (*run)(const RotaryHeads& heads);
  };
};

// Queries or keys, [batch, heads, rows, dim]; x and y may not overlap.
struct RotaryTensor {
  AttentionTensor x, y;
  int64_t heads;
};

// Of each position, [batch, rows, dim], the last dimension contiguous; a stride may be 0.
struct RotaryAngles {
  const void* cosine;
  const void* sine;
  int64_t cosine_batch_stride, cosine_row_stride, sine_batch_stride, sine_row_stride;
};

struct RotaryProblem {
  RotaryTensor q, k;
  RotaryAngles angles;
  DType dtype;
  int64_t batch, rows, dim;
};

void rotary(const RotaryProblem& problem);

}  // namespace pysparse
