#pragma once
// The dense product of a few tokens, written once for every vector width: a block of rows is
// streamed once, each loaded vector of weights meets every token. `V` is the vector policy of the
// including file:
//   V::Element, V::Input (types in memory), V::Block (what one step holds of a row), V::Sum,
//   V::kLanes (columns a step), load(p), load_tail(p, count), zero(),
//   multiply_add(block, input, sum) with input at 64-byte steps, reduce(sum).
// Include inside the target region: everything here is a template in an unnamed namespace.

namespace pysparse {
namespace {

template <class V, int kTokens, int kRows>
inline void dense_block(const DenseView& weight, int64_t row, const typename V::Input* x,
                        const OutputView& output, int64_t first_token) {
  const auto* w = static_cast<const typename V::Element*>(weight.values) + row * weight.cols;
  typename V::Sum sums[kRows][kTokens];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) sums[r][t] = V::zero();
  // Weights first, then one input at a time: rows + rows * tokens + 1 registers, which never spill.
  const auto step = [&](auto load) __attribute__((always_inline)) {
    typename V::Block weights[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) weights[r] = load(w + r * weight.cols);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        sums[r][t] = V::multiply_add(weights[r], x + t * V::kLanes, sums[r][t]);
    w += V::kLanes;
    x += kTokens * V::kLanes;
  };
  for (int64_t k = 0; k + V::kLanes <= weight.cols; k += V::kLanes)
    step([](const typename V::Element* p) __attribute__((always_inline)) { return V::load(p); });
  if (const int64_t rest = weight.cols % V::kLanes)
    step([rest](const typename V::Element* p)
             __attribute__((always_inline)) { return V::load_tail(p, rest); });
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t) {
    float rows[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) rows[r] = V::reduce(sums[r][t]);
    store_rows(rows, row, kRows, first_token + t, output);
  }
}

// Rows at a time: as many accumulators as registers allow, so that latency is hidden.
template <class V>
struct DenseRows {
  template <int kTokens>
  static void run(const DenseView& weight, int64_t row, int64_t end, const typename V::Input* x,
                  const OutputView& output, int64_t first_token) {
    constexpr int kFit = V::kAccumulators / kTokens;
    constexpr int kRows = kFit >= 8 ? 8 : kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
    for (; row + kRows <= end; row += kRows)
      dense_block<V, kTokens, kRows>(weight, row, x, output, first_token);
    for (; row < end; ++row) dense_block<V, kTokens, 1>(weight, row, x, output, first_token);
  }
};

template <class V>
void dense_rows(const DenseView& weight, int64_t row_begin, int64_t row_end, const void* input,
                int tokens, const OutputView& output, int64_t first_token) {
  const auto* x = static_cast<const typename V::Input*>(input);
  kTokenTable<DenseRows<V>, V::kMaxTokens>[tokens - 1](weight, row_begin, row_end, x, output,
                                                       first_token);
}

}  // namespace
}  // namespace pysparse
