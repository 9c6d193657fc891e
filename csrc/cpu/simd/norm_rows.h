#pragma once
// RMSNorm of rows, written once for every vector width; what does not fill a vector goes value by
// value. `V` is the vector policy of the including file:
//   V::Float, V::kLanes; set(f), load(p) and store(p, v) for float and BFloat16, add, mul;
//   round_to<T>(v): v rounded to T and back;
//   V::Sum, sums of squares in double: add_squares(sum, v), total(a, b) of two of them.
// V::kLanes = 0: no vectors. Include inside the target region, after <cmath>.
#include "pysparse/norm.h"

namespace pysparse {
namespace {

template <class T>
inline float rounded_to(float value) {
  T narrow;
  assign(narrow, value);
  return to_float(narrow);
}

template <class T, NormForm form>
inline void scale_value(float x, float factor, T weight, T& y) {
  const float normal = x * factor, w = to_float(weight);
  if constexpr (form == NormForm::kRounded)
    assign(y, rounded_to<T>(normal) * w);
  else
    assign(y, normal * (form == NormForm::kShifted ? 1.0f + w : w));
}

template <class V, class T>
inline float inverse_rms(const T* x, int64_t cols, float eps) {
  double total = 0.0;
  int64_t i = 0;
  if constexpr (V::kLanes > 0) {
    typename V::Sum sums[2] = {};  // apart: a sum waits for its last addition
    for (; i + 2 * V::kLanes <= cols; i += 2 * V::kLanes) {
      V::add_squares(sums[0], V::load(x + i));
      V::add_squares(sums[1], V::load(x + i + V::kLanes));
    }
    total = V::total(sums[0], sums[1]);
  }
  for (; i < cols; ++i) {
    const double value = to_float(x[i]);
    total += value * value;
  }
  return 1.0f / std::sqrt(static_cast<float>(total) / static_cast<float>(cols) + eps);
}

template <class V, class T, NormForm form>
inline void norm_row(const NormView& norm, const T* x, T* y) {
  const T* weight = static_cast<const T*>(norm.weight);
  const float factor = inverse_rms<V>(x, norm.cols, norm.eps);
  int64_t i = 0;
  if constexpr (V::kLanes > 0) {
    const auto factors = V::set(factor), one = V::set(1.0f);
    for (; i + V::kLanes <= norm.cols; i += V::kLanes) {
      auto normal = V::mul(V::load(x + i), factors), w = V::load(weight + i);
      if constexpr (form == NormForm::kRounded) normal = V::template round_to<T>(normal);
      if constexpr (form == NormForm::kShifted) w = V::add(one, w);
      V::store(y + i, V::mul(normal, w));
    }
  }
  for (; i < norm.cols; ++i) scale_value<T, form>(to_float(x[i]), factor, weight[i], y[i]);
}

template <class V, class T, NormForm form>
inline void norm_rows_as(const NormView& norm, const void* x, int64_t rows, void* y) {
  for (int64_t r = 0; r < rows; ++r)
    norm_row<V, T, form>(norm, static_cast<const T*>(x) + r * norm.cols,
                         static_cast<T*>(y) + r * norm.cols);
}

template <class V, class T>
void norm_rows(const NormView& norm, const void* x, int64_t rows, void* y) {
  switch (norm.form) {
    case NormForm::kRounded:
      return norm_rows_as<V, T, NormForm::kRounded>(norm, x, rows, y);
    case NormForm::kWide:
      return norm_rows_as<V, T, NormForm::kWide>(norm, x, rows, y);
    case NormForm::kShifted:
      return norm_rows_as<V, T, NormForm::kShifted>(norm, x, rows, y);
  }
}

}  // namespace
}  // namespace pysparse
