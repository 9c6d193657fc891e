#pragma once
// e^x for every vector width; `V` is a vector policy as gate_vectors.h describes it. Include inside
// the target region.

namespace pysparse {
namespace {

// e^x to 2 float32 ulps: x = n ln 2 + r, |r| <= ln 2 / 2; e^r = 1 + r + r^2 p(r), p fitted for the
// least largest error (3e-9).
template <class V>
inline typename V::Float natural_exp(typename V::Float x) {
  // Beyond, the result is 0 or infinity anyway; max and min hand a NaN through.
  x = V::min(V::set(89.0f), V::max(V::set(-104.0f), x));
  const auto n = V::round(V::mul(x, V::set(1.44269504f)));
  auto r = V::fma(n, V::set(-0.693359375f), x);  // exact: ln 2 in two parts, the first one short
  r = V::fma(n, V::set(2.12194440e-4f), r);
  auto p = V::fma(V::set(0.001381461275741458f), r, V::set(0.008368710055947304f));
  p = V::fma(p, r, V::set(0.04166838899254799f));
  p = V::fma(p, r, V::set(0.1666652113199234f));
  p = V::fma(p, r, V::set(0.4999999403953552f));
  p = V::fma(p, V::mul(r, r), V::add(r, V::set(1.0f)));
  return V::scale(p, n);
}

}  // namespace
}  // namespace pysparse
