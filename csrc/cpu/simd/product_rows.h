// Tiles of rows x vectors of a product, kept in registers over a panel's depth. Included inside a
// target region; `V` has kLanes, kRows, kVectors, Vector, load, store, broadcast and
// add_product(a, b, c) = a * b + c.

namespace pysparse {
namespace {

template <class V, int kRows>
void product_tile(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* panel,
                  int depth, float alpha, int live) {
  constexpr int kWidth = V::kVectors * V::kLanes;
  typename V::Vector sums[kRows][V::kVectors];
  for (auto& row : sums)
    for (auto& sum : row) sum = V::broadcast(0.0f);
  for (int k = 0; k < depth; ++k) {
    typename V::Vector b[V::kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < V::kVectors; ++v) b[v] = V::load(panel + k * kWidth + v * V::kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const auto x = V::broadcast(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < V::kVectors; ++v) sums[r][v] = V::add_product(x, b[v], sums[r][v]);
    }
  }
  const auto factor = V::broadcast(alpha);
  for (int r = 0; r < kRows; ++r) {
    alignas(64) float buffer[kWidth];
    float* target = c + r * c_stride;
    std::copy(target, target + live, buffer);
    for (int v = 0; v < V::kVectors; ++v)
      V::store(buffer + v * V::kLanes,
               V::add_product(factor, sums[r][v], V::load(buffer + v * V::kLanes)));
    std::copy(buffer, buffer + live, target);
  }
}

template <class V>
void product_rows(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* panel,
                  int64_t rows, int depth, float alpha, int live) {
  int64_t r = 0;
  for (; r + V::kRows <= rows; r += V::kRows)
    product_tile<V, V::kRows>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, panel, depth,
                              alpha, live);
  for (; r < rows; ++r)
    product_tile<V, 1>(c + r * c_stride, c_stride, a + r * a_stride, a_stride, panel, depth, alpha,
                       live);
}

}  // namespace
}  // namespace pysparse
