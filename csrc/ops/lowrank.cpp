// Tiles of a masked low-rank weight: check, choose a kernel, split rows or columns over threads.
#include "pysparse/lowrank.h"

#include <memory>

#include "pysparse/parallel.h"

namespace pysparse {
namespace {

void check_tile(const LowRankView& view, int64_t begin, int64_t end) {
  check(view.mask.rows >= 0 && view.mask.cols >= 0, "negative shape ", view.mask.rows, " x ",
        view.mask.cols);
  check(view.rank >= 0, "rank ", view.rank, " is negative");
  check(0 <= begin && begin <= end && end <= view.mask.rows, "rows [", begin, ", ", end,
        ") are not within the ", view.mask.rows, " rows of the weight");
}

// Arithmetic of a tile in bytes that take as long to stream: rank products a weight.
int64_t work(const LowRankView& view, int64_t rows) {
  return rows * view.mask.cols * (1 + view.rank / 4) * 4;
}

}  // namespace

void lowrank_expand(const LowRankView& view, DType dtype, int64_t begin, int64_t end, void* tile) {
  check_tile(view, begin, end);
  const auto& kernel = lookup<LowRank>(dtype);
  parallel(threads_for(work(view, end - begin)), [&](int thread, int threads) {
    const Range rows = even_share(end - begin, thread, threads);
    char* out = static_cast<char*>(tile) + rows.begin * view.mask.cols * size_of(dtype);
    kernel.expand(view, begin + rows.begin, begin + rows.end, out);
  });
}

void lowrank_contract(const LowRankView& view, DType dtype, const void* gradient, int64_t begin,
                      int64_t end, float* up, float* down, float* values) {
  check_tile(view, begin, end);
  const auto& kernel = lookup<LowRank>(dtype);
  const int64_t blocks = (view.mask.cols + kContractCols - 1) / kContractCols;
  const int64_t sums = (end - begin) * view.rank;
  const std::unique_ptr<float[]> partial(new float[static_cast<size_t>(blocks * sums)]);
  parallel_for(blocks, work(view, end - begin), [&](int64_t block) {
    const int64_t first = block * kContractCols;
    const int64_t last = std::min(view.mask.cols, first + kContractCols);
    kernel.contract(view, gradient, begin, end, first, last,
                    {partial.get() + block * sums, down, values});
  });
  for (int64_t i = 0; i < sums; ++i) {
    float sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[block * sums + i];
    up[begin * view.rank + i] = sum;
  }
}

}  // namespace pysparse
