// n of every m by counting, for each weight, who goes before it: the oracle, and for any m.
#include <algorithm>
#include <cmath>

#include "isa/generic.h"
#include "pysparse/select.h"

namespace pysparse {
namespace {

constexpr int kLargest = 64;  // m

template <class T>
int64_t run(const ScoredView& view, int n, int m, int64_t begin, int64_t end,
            const Selection& out) {
  int64_t damaged = 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* weight = static_cast<const T*>(view.weight) + r * view.cols;
    uint8_t* keep = out.keep + r * view.cols;
    for (int64_t first = 0; first < view.cols; first += m) {
      const int size = static_cast<int>(std::min<int64_t>(m, view.cols - first));
      int32_t keys[kLargest];
      for (int i = 0; i < size; ++i) {
        const float score = score_of(to_float(weight[first + i]), view.scale, first + i);
        damaged += std::isnan(score);
        keys[i] = key_of(score);
      }
      for (int i = 0; i < size; ++i) {
        int before = 0;
        for (int j = 0; j < size; ++j) before += j < i ? keys[j] <= keys[i] : keys[j] < keys[i];
        keep[first + i] = size < m || before >= m - n;
      }
    }
    if (!out.pruned) continue;
    T* pruned = static_cast<T*>(out.pruned) + r * view.cols;
    for (int64_t c = 0; c < view.cols; ++c) pruned[c] = keep[c] ? weight[c] : T{};
  }
  return damaged;
}

bool covers(int m) { return m <= kLargest; }

constexpr NmSelect::Kernel kFloat32{covers, run<float>};
constexpr NmSelect::Kernel kBFloat16{covers, run<BFloat16>};
const Register<NmSelect> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                         {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace

const NmSelect::Kernel& nm_select_generic(DType dtype) {
  return dtype == DType::kFloat32 ? kFloat32 : kBFloat16;
}

}  // namespace pysparse
