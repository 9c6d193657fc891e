// Marginals to whole numbers, added row by row: the oracle.
#include <cmath>

#include "isa/generic.h"
#include "pysparse/shapley_entries.h"

namespace pysparse {
namespace {

void run(const MarginalTile& tile, const EntryTotals& totals, RowRange mine) {
  const int width = padded_width(tile.cols);
  for (int64_t i = 0; i < tile.samples * tile.fields; ++i) {
    if (!mine.has(tile.ids[i])) continue;
    const int64_t row = int64_t{tile.ids[i]} * tile.cols;
    for (int k = 0; k < tile.cols; ++k) {
      const double x = tile.marginals[i * width + k];
      double spread = x;
      totals.sums[row + k] += std::llrint(x * kSumScale);
      if (tile.again) {
        const double y = tile.again[i * width + k];
        totals.sums[row + k] += std::llrint(y * kSumScale);
        spread = x - y;
      }
      totals.squares[row + k] += std::llrint(spread * spread * kSquareScale);
    }
  }
}

constexpr ShapleyAdd::Kernel kKernel{run};
const Register<ShapleyAdd> registered{DType::kFloat32, isa::kGeneric, kKernel};

}  // namespace
}  // namespace pysparse
