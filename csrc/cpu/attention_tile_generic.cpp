// Softmax attention of a tile, one row and key after the other, sums in double: the oracle of the
// other tile kernels.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/generic.h"
#include "pysparse/attention.h"

namespace pysparse {
namespace {

constexpr int kWidth = 16;

uint32_t word_of(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return word;
}

float value_of(uint32_t word) {
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
float element(const AttentionRows& rows, int i, int d) {
  if (i >= rows.count || d >= rows.dim) return 0.0f;
  const int64_t number = rows.index ? rows.index[i] : i;
  return to_float(static_cast<const T*>(rows.first)[number * rows.stride + d]);
}

template <class T>
void pack_queries(const AttentionRows& rows, int padded, int width, uint32_t* words) {
  for (int d = 0; d < padded; ++d)
    for (int i = 0; i < width; ++i) words[d * width + i] = word_of(element<T>(rows, i, d));
}

template <class T>
void pack_keys(const AttentionRows& rows, int padded, uint32_t* words) {
  for (int i = 0; i < rows.count; ++i)
    for (int d = 0; d < padded; ++d)
      words[static_cast<int64_t>(i) * padded + d] = word_of(element<T>(rows, i, d));
}

double dot(const uint32_t* queries, int width, int lane, const uint32_t* key, int depth) {
  double sum = 0;
  for (int d = 0; d < depth; ++d)
    sum += static_cast<double>(value_of(queries[d * width + lane])) * value_of(key[d]);
  return sum;
}

// Keys of the panel that a row sees: those up to its own.
int seen_by(const AttentionPanel& panel, int row) {
  return std::clamp(row + panel.diagonal + 1, 0, panel.count);
}

// Writes a row's dot products and returns the largest, -inf if there is none.
float score_row(const AttentionPanel& panel, int row, float* scores) {
  float peak = -INFINITY;
  for (int t = 0; t < seen_by(panel, row); ++t) {
    const uint32_t* key = panel.keys + static_cast<int64_t>(t) * panel.padded;
    scores[t] = static_cast<float>(dot(panel.queries, kWidth, row, key, panel.padded));
    peak = std::max(peak, scores[t]);
  }
  return peak;
}

void add_panel(const AttentionPanel& panel, const AttentionTileState& state, float* scratch) {
  for (int row = 0; row < kWidth; ++row) {
    const float peak = score_row(panel, row, scratch);
    const float reference = std::max(state.reference[row], peak);
    const double shrink = std::exp2((double{state.reference[row]} - reference) * panel.scale);
    state.maximum[row] = std::max(state.maximum[row], peak);
    state.reference[row] = reference;
    double sum = state.sum[row] * shrink;
    for (int t = 0; t < seen_by(panel, row); ++t) {
      scratch[t] = static_cast<float>(std::exp2((double{scratch[t]} - reference) * panel.scale));
      sum += scratch[t];
    }
    state.sum[row] = static_cast<float>(sum);
    for (int d = 0; d < panel.padded; ++d) {
      float* out = state.out + d * kWidth + row;
      double total = *out * shrink;
      for (int t = 0; t < seen_by(panel, row); ++t)
        total +=
            double{scratch[t]} * value_of(panel.values[static_cast<int64_t>(t) * panel.padded + d]);
      *out = static_cast<float>(total);
    }
  }
}

void weigh_panel(const AttentionPanel& panel, float* maximum, float* sum, float* scratch) {
  for (int row = 0; row < kWidth; ++row) {
    const float peak = maximum[row] = score_row(panel, row, scratch);
    double total = 0;
    for (int t = 0; t < seen_by(panel, row); ++t)
      total += std::exp2((double{scratch[t]} - std::max(peak, -1e30f)) * panel.scale);
    sum[row] = static_cast<float>(total);
  }
}

void mark(const uint32_t* pools, const float* thresholds, const uint32_t* keys, int64_t count,
          int padded, uint8_t* keep) {
  for (int64_t j = 0; j < count; ++j)
    for (int u = 0; u < kPoolLanes; ++u) {
      const double score = dot(pools, kPoolLanes, u, keys + j * padded, padded);
      if (!(static_cast<float>(score) < thresholds[u])) keep[j] = 1;
    }
}

template <class T>
void store(const AttentionTileState& state, int rows, int dim, bool as_float, void* out,
           int64_t stride) {
  for (int i = 0; i < rows; ++i)
    for (int d = 0; d < dim; ++d) {
      const float sum = state.sum[i];
      const float value = sum == 0 ? 0.0f : state.out[d * kWidth + i] / sum;
      if (as_float)
        static_cast<float*>(out)[i * stride + d] = value;
      else
        assign(static_cast<T*>(out)[i * stride + d], value);
    }
}

void load(const float* out, int64_t stride, int rows, int dim, int padded,
          const AttentionTileState& state) {
  std::fill_n(state.out, padded * kWidth, 0.0f);
  for (int i = 0; i < rows; ++i)
    for (int d = 0; d < dim; ++d) state.out[d * kWidth + i] = out[i * stride + d] * state.sum[i];
}

template <class T>
constexpr AttentionTile::Kernel kKernel{kWidth,       1,         pack_queries<T>, pack_keys<T>,
                                        pack_keys<T>, add_panel, weigh_panel,     mark,
                                        store<T>,     load};
const Register<AttentionTile> registered[] = {{DType::kFloat32, isa::kGeneric, kKernel<float>},
                                              {DType::kBFloat16, isa::kGeneric, kKernel<BFloat16>}};

}  // namespace
}  // namespace pysparse
