#pragma once
// Attention of one query row a sequence over all its keys: a decoding step. Each key and value is
// read once, so memory is the limit for long contexts and the number of calls for short ones.
#include "pysparse/attention.h"

namespace pysparse {

struct RowProblem {
  AttentionTensor q, k, v;  // [batch, heads, 1, dim], [batch, key heads, keys, dim or value_dim]
  DType dtype;
  int64_t batch, heads, key_heads, keys, dim, value_dim;
  float scale;  // of the logits
};

// Query heads that share a key head.
struct RowHeads {
  const void* q;  // head h at h * q_stride
  const void* k;  // key t at t * k_stride, and likewise values
  const void* v;
  void* out;  // [heads][value_dim]
  int64_t q_stride, k_stride, v_stride;
  int64_t heads, keys, dim, value_dim;
  float scale;

  static constexpr int64_t kLanes = 16;  // that a head's weights are padded to
  int64_t padded_keys() const { return (keys + kLanes - 1) / kLanes * kLanes; }
  int64_t scratch_floats() const { return heads * (dim + padded_keys() + value_dim); }
};

struct RowAttention {
  static constexpr const char* op = "row-attention";
  static constexpr const char* format = "dense";
  struct Kernel {
    // Logits, weights and sums are float32; the result is rounded once.
    void (*run)(const RowHeads& heads, float* scratch);
  };
};

// out[b][0][h] = softmax(scale q k^T) v, [batch][1][heads][value_dim]: query head h reads key head
// h / (heads / key_heads).
void row_attention(const RowProblem& problem, void* out);

}  // namespace pysparse
