#pragma once
// activation(gate) * up, written once for every vector width. `V` is the vector policy of the
// including file (floats_*.h):
//   V::Float, V::kLanes; set(f), load(p) and store(p, v) for float and BFloat16, round_to<T>(v): v
//   rounded to T and back; add, sub, mul, div, round, fma(a, b, c) = a b + c, min(a, b) and
//   max(a, b), which return b when either is a NaN; negative(v, a, b) = v < 0 ? a : b;
//   scale(v, n) = v 2^n for a whole n from -151 to 129.
// Include inside the target region: everything here is a template in an unnamed namespace.
#include "simd/exp_vectors.h"

namespace pysparse {
namespace {

// The normal distribution function: erfc(z) = e^(-z^2) t q(t), t = 1 / (1 + 0.4 z), for z =
// |x| / sqrt 2, q fitted for the least largest relative error (7e-8) up to z = 10.5.
template <class V>
inline typename V::Float normal_distribution(typename V::Float x) {
  constexpr float kQ[] = {0.22633428871631622f,  0.20266124606132507f, 0.19038273394107819f,
                          0.08678767830133438f,  0.07784177362918854f, 0.09278574585914612f,
                          -0.14455284178256989f, 0.04211881011724472f};
  const auto one = V::set(1.0f), size = V::max(x, V::sub(V::set(0.0f), x));
  const auto t = V::div(one, V::fma(size, V::set(0.28284271f), one));
  auto q = V::set(kQ[7]);
  for (int i = 6; i >= 0; --i) q = V::fma(q, t, V::set(kQ[i]));
  q = V::fma(q, t, V::set(0.22564063966274261f));
  const auto tail = V::mul(V::mul(V::mul(V::set(0.5f), t), q),
                           natural_exp<V>(V::mul(V::mul(x, V::set(-0.5f)), x)));
  return V::negative(x, tail, V::sub(one, tail));
}

template <class V>
inline typename V::Float activate(Activation activation, typename V::Float x) {
  const auto one = V::set(1.0f), zero = V::set(0.0f);
  if (activation == Activation::kRelu) return V::max(zero, x);
  if (activation == Activation::kGelu) return V::mul(x, normal_distribution<V>(x));
  auto u = V::sub(zero, x);  // x / (1 + e^u)
  if (activation == Activation::kGeluTanh)
    u = V::mul(u, V::fma(V::mul(x, x), V::set(0.071354816f), V::set(1.5957691f)));
  return V::div(x, V::add(one, natural_exp<V>(u)));
}

template <class V, class T>
void gate_values(Activation activation, void* gate, const void* up, int64_t count) {
  T* values = static_cast<T*>(gate);
  const T* factors = static_cast<const T*>(up);
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const auto active = V::template round_to<T>(activate<V>(activation, V::load(values + i)));
    V::store(values + i, V::mul(active, V::load(factors + i)));
  }
}

}  // namespace
}  // namespace pysparse
