// Rows of M * (W + s B A), and the gradients of W, A and B from theirs, in double: the oracle.
#include "isa/generic.h"
#include "pysparse/lowrank.h"
#include "simd/mask_row.h"

namespace pysparse {
namespace {

template <class T>
void expand(const LowRankView& view, int64_t begin, int64_t end, void* tile) {
  const int64_t cols = view.mask.cols;
  T* out = static_cast<T*>(tile);
  for (int64_t r = begin; r < end; ++r) {
    const MaskRow bits(view.mask, r);
    int64_t next = view.mask.row_offsets[r];
    for (int64_t c = 0; c < cols; ++c, ++out) {
      double sum = 0;
      if (bits.kept(c)) {
        for (int64_t k = 0; k < view.rank; ++k)
          sum += double{view.up[r * view.rank + k]} * view.down[k * cols + c];
        sum = sum * view.scale + (view.values ? view.values[next++] : 0.0f);
      }
      assign(*out, static_cast<float>(sum));
    }
  }
}

template <class T>
void contract(const LowRankView& view, const void* gradient, int64_t begin, int64_t end,
              int64_t first, int64_t last, const LowRankGradient& out) {
  const int64_t cols = view.mask.cols;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = static_cast<const T*>(gradient) + (r - begin) * cols;
    const MaskRow bits(view.mask, r);
    for (int64_t k = 0; k < view.rank; ++k) {
      double sum = 0;
      for (int64_t c = first; c < last; ++c) {
        if (!bits.kept(c)) continue;
        sum += double{to_float(row[c])} * view.down[k * cols + c];
        out.down[k * cols + c] += view.scale * view.up[r * view.rank + k] * to_float(row[c]);
      }
      out.up_sums[(r - begin) * view.rank + k] = static_cast<float>(sum * view.scale);
    }
    if (!out.values) continue;
    int64_t next = view.mask.row_offsets[r] + bits.kept_before(first);
    for (int64_t c = first; c < last; ++c)
      if (bits.kept(c)) out.values[next++] = to_float(row[c]);
  }
}

constexpr LowRank::Kernel kFloat{expand<float>, contract<float>};
constexpr LowRank::Kernel kHalf{expand<BFloat16>, contract<BFloat16>};
const Register<LowRank> registered_float{DType::kFloat32, isa::kGeneric, kFloat};
const Register<LowRank> registered_half{DType::kBFloat16, isa::kGeneric, kHalf};

}  // namespace
}  // namespace pysparse
