#pragma once
// Rotary position embedding, written once for every vector width; what does not fill a vector goes
// value by value. `V` is a vector policy (floats_*.h) with apart(v): v, hidden from the compiler,
// which would fuse a product with the sum that follows it. V::kLanes = 0: no vectors. Include
// inside the target region.
#include "pysparse/rotary.h"

namespace pysparse {
namespace {

template <class T>
inline float rounded_product(float a, float b) {
  T narrow;
  assign(narrow, a * b);
  const volatile float apart = to_float(narrow);
  return apart;
}

template <class V, class T>
inline typename V::Float rounded_product_of(typename V::Float a, typename V::Float b) {
  return V::apart(V::template round_to<T>(V::mul(a, b)));
}

template <class V, class T>
inline void rotate_head(const T* x, const T* cosine, const T* sine, int64_t half, T* y) {
  int64_t i = 0;
  if constexpr (V::kLanes > 0)
    for (; i + V::kLanes <= half; i += V::kLanes) {
      const auto low = V::load(x + i), high = V::load(x + half + i);
      V::store(y + i, V::sub(rounded_product_of<V, T>(low, V::load(cosine + i)),
                             rounded_product_of<V, T>(high, V::load(sine + i))));
      V::store(y + half + i, V::add(rounded_product_of<V, T>(high, V::load(cosine + half + i)),
                                    rounded_product_of<V, T>(low, V::load(sine + half + i))));
    }
  for (; i < half; ++i) {
    const float low = to_float(x[i]), high = to_float(x[half + i]);
    assign(y[i], rounded_product<T>(low, to_float(cosine[i])) -
                     rounded_product<T>(high, to_float(sine[i])));
    assign(y[half + i], rounded_product<T>(high, to_float(cosine[half + i])) +
                            rounded_product<T>(low, to_float(sine[half + i])));
  }
}

template <class V, class T>
void rotate_heads(const RotaryHeads& h) {
  for (int64_t head = 0; head < h.heads; ++head)
    rotate_head<V>(static_cast<const T*>(h.x) + head * h.x_stride, static_cast<const T*>(h.cosine),
                   static_cast<const T*>(h.sine), h.dim / 2,
                   static_cast<T*>(h.y) + head * h.y_stride);
}

}  // namespace
}  // namespace pysparse
