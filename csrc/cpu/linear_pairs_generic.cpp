// y = W x, pair by pair, in double: the oracle of the other pair kernels.
#include <algorithm>

#include "isa/generic.h"
#include "pysparse/linear.h"
#include "simd/pairs_scalar.h"

namespace pysparse {
namespace {

template <class T>
void add_block(const PairsView& weight, int64_t row_block, int64_t col_block, const float* input,
               int tokens, int width, double* sums) {
  const int64_t first = weight.first_slot(row_block, col_block), slots = weight.slots(row_block);
  const int64_t start = weight.block_offsets[row_block * weight.col_blocks() + col_block];
  const T* values = static_cast<const T*>(weight.values) + 2 * start;
  const uint8_t* indices = weight.indices + 2 * start;
  for (int64_t slot = 0; slot < slots; slot += kPairGroup) {
    const int64_t entries = kPairGroup * weight.counts[(first + slot) / kPairGroup];
    for (int64_t i = 0; i < 2 * entries; ++i) {
      const double w = to_float(*values++);
      const float* x = input + (col_block * weight.block_cols() + *indices++) * width;
      double* row = sums + weight.row_order[first + slot + i / 2 % kPairGroup] * width;
      for (int t = 0; t < tokens; ++t) row[t] += w * x[t];
    }
  }
}

template <class T>
void run(const PairsView& weight, int64_t row_block, const void* input, int tokens, int width,
         void* scratch, const OutputView& output, int64_t first_token) {
  double* sums = static_cast<double*>(scratch);
  std::fill(sums, sums + kPairRows * width, 0.0);
  for (int64_t cb = 0; cb < weight.col_blocks(); ++cb)
    add_block<T>(weight, row_block, cb, static_cast<const float*>(input), tokens, width, sums);
  const int64_t first_row = row_block * kPairRows;
  for (int64_t row = 0; row < weight.rows_in(row_block); ++row) {
    float rounded[PairsLinear::kWidest];
    for (int t = 0; t < tokens; ++t) rounded[t] = static_cast<float>(sums[row * width + t]);
    store_pairs(rounded, first_row + row, 1, tokens, width, output, first_token);
  }
}

constexpr PairsLinear::Kernel kFloat32{DType::kFloat32, 64, transpose_scalar<float>, run<float>};
constexpr PairsLinear::Kernel kBFloat16{DType::kFloat32, 64, transpose_scalar<BFloat16>,
                                        run<BFloat16>};
const Register<PairsLinear> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                            {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
