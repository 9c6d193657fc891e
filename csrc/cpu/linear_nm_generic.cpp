// y = W x for any n:m, in double: the oracle, and the kernel of the patterns that have no other.
#include <vector>

#include "isa/generic.h"
#include "pysparse/nm_slots.h"
#include "simd/store.h"

namespace pysparse {
namespace {

constexpr int kMaxTokens = 16;

template <class T>
void run(const NmView& weight, int64_t tile, const void* input, int tokens,
         const OutputView& output, int64_t first_token) {
  const NmLayout& layout = weight.layout;
  const T* x = static_cast<const T*>(input);
  const T* values = static_cast<const T*>(weight.values) + tile * layout.tile_values();
  const int64_t rows = std::min(kTileRows, layout.rows - tile * kTileRows);
  for (int64_t r = 0; r < rows; ++r) {
    double sums[kMaxTokens] = {};
    for_each_slot(
        weight, tile, r, [](int64_t) { return true; },
        [&](int64_t col, int64_t place) {
          const InputPlace at = input_place(layout, col, tokens);
          const double w = to_float(values[place]);
          for (int t = 0; t < tokens; ++t) sums[t] += w * to_float(x[at.first + t * at.stride]);
        });
    for (int t = 0; t < tokens; ++t) {
      const float rounded = static_cast<float>(sums[t]);
      store_rows(&rounded, tile * kTileRows + r, 1, first_token + t, output);
    }
  }
}

template <class T>
void run_as_dense(const NmView& weight, int64_t tile, const T* x, int64_t tokens,
                  const OutputView& output) {
  const NmLayout& layout = weight.layout;
  const T* values = static_cast<const T*>(weight.values) + tile * layout.tile_values();
  const int64_t rows = std::min(kTileRows, layout.rows - tile * kTileRows);
  std::vector<double> dense(layout.cols);
  for (int64_t r = 0; r < rows; ++r) {
    std::fill(dense.begin(), dense.end(), 0.0);
    for_each_slot(
        weight, tile, r, [](int64_t) { return true; },
        [&](int64_t col, int64_t place) { dense[col] = to_float(values[place]); });
    for (int64_t t = 0; t < tokens; ++t) {
      double sum = 0;
      for (int64_t k = 0; k < layout.cols; ++k) sum += dense[k] * to_float(x[t * layout.cols + k]);
      const float rounded = static_cast<float>(sum);
      store_rows(&rounded, tile * kTileRows + r, 1, t, output);
    }
  }
}

constexpr NmLinear::Kernel kFloat32{DType::kFloat32, kMaxTokens, covers_all, run<float>};
constexpr NmLinear::Kernel kBFloat16{DType::kBFloat16, kMaxTokens, covers_all, run<BFloat16>};
const Register<NmLinear> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                         {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace

const NmLinear::Kernel& nm_generic(DType dtype) {
  return dtype == DType::kFloat32 ? kFloat32 : kBFloat16;
}

void nm_run_as_dense(const NmView& weight, int64_t tile, const void* x, int64_t tokens,
                     const OutputView& output) {
  if (output.dtype == DType::kFloat32)
    run_as_dense(weight, tile, static_cast<const float*>(x), tokens, output);
  else
    run_as_dense(weight, tile, static_cast<const BFloat16*>(x), tokens, output);
}

}  // namespace pysparse
