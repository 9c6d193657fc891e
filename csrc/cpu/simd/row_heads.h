#pragma once
// Attention of single rows, written once for every vector width. Keys come in panels that stay in
// the first-level cache while all query heads of the task pass over them. `V` is a vector policy
// (floats_*.h). Include inside the target region, after <algorithm> and <cmath>.
#include "pysparse/row_attention.h"
#include "simd/exp_vectors.h"

namespace pysparse {
namespace {

constexpr int64_t kRowPanel = 64;  // keys: 16 KB of bf16 at 128 dimensions
constexpr int kRowKeys = 4;        // at once: as many sums as an addition takes cycles
constexpr int kRowVectors = 8;     // of one head's result that stay in registers

// logits[i] = scale * query . keys[i]
template <class V, int kKeys, class T>
inline void score(const RowHeads& h, const float* query, const T* keys, float* logits) {
  typename V::Float sums[kKeys];
  for (auto& sum : sums) sum = V::set(0.0f);
  int64_t d = 0;
  for (; d + V::kLanes <= h.dim; d += V::kLanes) {
    const auto q = V::load(query + d);
    for (int i = 0; i < kKeys; ++i)
      sums[i] = V::fma(q, V::load(keys + i * h.k_stride + d), sums[i]);
  }
  for (int i = 0; i < kKeys; ++i) {
    float sum = V::sum(sums[i]);
    for (int64_t rest = d; rest < h.dim; ++rest)
      sum += query[rest] * to_float(keys[i * h.k_stride + rest]);
    logits[i] = sum * h.scale;
  }
}

// Logits, padded by -inf, become weights; returns their sum.
template <class V>
inline float weigh(float* logits, int64_t count) {
  auto largest = V::set(-INFINITY), sum = V::set(0.0f);
  for (int64_t t = 0; t < count; t += V::kLanes) largest = V::max(V::load(logits + t), largest);
  const auto top = V::set(V::largest(largest));
  for (int64_t t = 0; t < count; t += V::kLanes) {
    const auto weight = natural_exp<V>(V::sub(V::load(logits + t), top));
    V::store(logits + t, weight);
    sum = V::add(sum, weight);
  }
  return V::sum(sum);
}

// out[..kVectors vectors] += weights[t] * values[t], for `count` keys
template <class V, int kVectors, class T>
inline void add_values(const float* weights, const T* values, int64_t stride, int64_t count,
                       float* out) {
  typename V::Float sums[kVectors];
  for (int c = 0; c < kVectors; ++c) sums[c] = V::load(out + c * V::kLanes);
  for (int64_t t = 0; t < count; ++t) {
    const auto weight = V::set(weights[t]);
    for (int c = 0; c < kVectors; ++c)
      sums[c] = V::fma(weight, V::load(values + t * stride + c * V::kLanes), sums[c]);
  }
  for (int c = 0; c < kVectors; ++c) V::store(out + c * V::kLanes, sums[c]);
}

template <class V, class T>
inline void add_panel(const RowHeads& h, const float* weights, const T* values, int64_t count,
                      float* out) {
  int64_t d = 0;
  for (; d + kRowVectors * V::kLanes <= h.value_dim; d += kRowVectors * V::kLanes)
    add_values<V, kRowVectors>(weights, values + d, h.v_stride, count, out + d);
  for (; d + V::kLanes <= h.value_dim; d += V::kLanes)
    add_values<V, 1>(weights, values + d, h.v_stride, count, out + d);
  for (; d < h.value_dim; ++d)
    for (int64_t t = 0; t < count; ++t) out[d] += weights[t] * to_float(values[t * h.v_stride + d]);
}

template <class V, class T>
inline void score_panel(const RowHeads& h, const float* query, const T* keys, int64_t count,
                        float* logits) {
  int64_t t = 0;
  for (; t + kRowKeys <= count; t += kRowKeys)
    score<V, kRowKeys>(h, query, keys + t * h.k_stride, logits + t);
  for (; t < count; ++t) score<V, 1>(h, query, keys + t * h.k_stride, logits + t);
}

template <class V, class T>
void attend_rows(const RowHeads& h, float* scratch) {
  const int64_t padded = h.padded_keys();
  float* queries = scratch;                    // [heads][dim]
  float* weights = queries + h.heads * h.dim;  // [heads][padded]
  float* sums = weights + h.heads * padded;    // [heads][value_dim]
  for (int64_t head = 0; head < h.heads; ++head)
    for (int64_t d = 0; d < h.dim; ++d)
      queries[head * h.dim + d] = to_float(static_cast<const T*>(h.q)[head * h.q_stride + d]);
  std::fill(sums, sums + h.heads * h.value_dim, 0.0f);
  for (int64_t t = 0; t < h.keys; t += kRowPanel)
    for (int64_t head = 0; head < h.heads; ++head)
      score_panel<V>(h, queries + head * h.dim, static_cast<const T*>(h.k) + t * h.k_stride,
                     std::min(kRowPanel, h.keys - t), weights + head * padded + t);
  // The queries are done with: their place holds the sums of the weights.
  for (int64_t head = 0; head < h.heads; ++head) {
    float* logits = weights + head * padded;
    std::fill(logits + h.keys, logits + padded, -INFINITY);
    queries[head] = weigh<V>(logits, padded);
  }
  for (int64_t t = 0; t < h.keys; t += kRowPanel)
    for (int64_t head = 0; head < h.heads; ++head)
      add_panel<V>(h, weights + head * padded + t, static_cast<const T*>(h.v) + t * h.v_stride,
                   std::min(kRowPanel, h.keys - t), sums + head * h.value_dim);
  for (int64_t head = 0; head < h.heads; ++head)
    for (int64_t d = 0; d < h.value_dim; ++d)
      assign(static_cast<T*>(h.out)[head * h.value_dim + d],
             sums[head * h.value_dim + d] / queries[head]);
}

}  // namespace
}  // namespace pysparse
