// The k smallest scores of a row by std::nth_element: the oracle.
#include <algorithm>
#include <cmath>

#include "isa/generic.h"
#include "pysparse/select.h"

namespace pysparse {
namespace {

template <class T>
void finish_row(const T* weight, const int32_t* keys, int64_t cols, int32_t last, int64_t ties,
                uint8_t* keep, T* pruned) {
  for (int64_t c = 0; c < cols; ++c) {
    const bool tied = keys[c] == last && ties > 0;
    ties -= tied;
    keep[c] = !(keys[c] < last || tied);
    if (pruned) pruned[c] = keep[c] ? weight[c] : T{};
  }
}

template <class T>
int64_t run(const ScoredView& view, int64_t count, int64_t begin, int64_t end, int32_t* keys,
            const Selection& out) {
  int64_t damaged = 0;
  int32_t* sorted = keys + RowSelect::padded(view.cols);
  for (int64_t r = begin; r < end; ++r) {
    const T* weight = static_cast<const T*>(view.weight) + r * view.cols;
    for (int64_t c = 0; c < view.cols; ++c) {
      const float score = score_of(to_float(weight[c]), view.scale, c);
      damaged += std::isnan(score);
      keys[c] = key_of(score);
    }
    int32_t last = 0;
    int64_t ties = 0;
    if (count > 0) {
      std::copy(keys, keys + view.cols, sorted);
      std::nth_element(sorted, sorted + count - 1, sorted + view.cols);
      last = sorted[count - 1];
      ties = count - std::count_if(keys, keys + view.cols, [&](int32_t key) { return key < last; });
    } else {
      last = INT32_MIN;
    }
    finish_row(weight, keys, view.cols, last, ties, out.keep + r * view.cols,
               out.pruned ? static_cast<T*>(out.pruned) + r * view.cols : nullptr);
  }
  return damaged;
}

constexpr RowSelect::Kernel kFloat32{run<float>};
constexpr RowSelect::Kernel kBFloat16{run<BFloat16>};
const Register<RowSelect> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                          {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
