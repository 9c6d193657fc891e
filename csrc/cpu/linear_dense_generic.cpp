// y = W x for a row-major dense weight, in double: the oracle.
#include "isa/generic.h"
#include "pysparse/linear.h"
#include "simd/store.h"

namespace pysparse {
namespace {

template <class T>
void run(const DenseView& weight, int64_t row_begin, int64_t row_end, const void* input, int tokens,
         const OutputView& output, int64_t first_token) {
  const T* x = static_cast<const T*>(input);  // one column a block: x[col][token]
  for (int t = 0; t < tokens; ++t) {
    for (int64_t r = row_begin; r < row_end; ++r) {
      const T* row = static_cast<const T*>(weight.values) + r * weight.cols;
      double sum = 0;
      for (int64_t k = 0; k < weight.cols; ++k)
        sum += double{to_float(row[k])} * to_float(x[k * tokens + t]);
      const float rounded = static_cast<float>(sum);
      store_rows(&rounded, r, 1, first_token + t, output);
    }
  }
}

constexpr DenseLinear::Kernel kFloat32{{DType::kFloat32, 1}, 16, run<float>};
constexpr DenseLinear::Kernel kBFloat16{{DType::kBFloat16, 1}, 16, run<BFloat16>};
const Register<DenseLinear> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                            {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
