// Many tokens by pair blocks: transpose the activations, then give out (block of rows, tile of
// tokens) one by one. Each output has one writer and one order of summation, so bits depend
// neither on the number of threads nor on which thread came first.
#include <atomic>
#include <cmath>
#include <vector>

#include "../formats/bits.h"
#include "../formats/pairs.h"
#include "pysparse/error.h"
#include "pysparse/kernel_table.h"
#include "pysparse/linear.h"
#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {
namespace {

// Tokens transposed at a time: bounds the memory, and the weight is read once for all of them.
constexpr int64_t kTokensAtOnce = 512;
constexpr int64_t kTransposeCols = 256;  // a share of the transpose

void check_sizes(const PairsView& weight, const PairsSizes& sizes) {
  check(weight.rows >= 0 && weight.cols >= 0, "negative shape ", weight.rows, " x ", weight.cols);
  const int64_t blocks = weight.row_blocks() * weight.col_blocks();
  check(sizes.block_offsets == blocks + 1, "block_offsets hold ", sizes.block_offsets,
        " entries, expected ", blocks + 1);
  check(sizes.row_order == weight.total_slots() + kPairGroup, "row_order holds ", sizes.row_order,
        " rows, expected ", weight.total_slots() + kPairGroup);
  check(sizes.counts == weight.total_slots() / kPairGroup, "counts hold ", sizes.counts,
        " entries, expected ", weight.total_slots() / kPairGroup);
  check(weight.block_offsets[0] == 0 && weight.block_offsets[blocks] == sizes.entries,
        "block_offsets run from ", weight.block_offsets[0], " to ", weight.block_offsets[blocks],
        ", expected 0 to ", sizes.entries);
}

// The transposed activations of some tokens, tile after tile.
struct Tiles {
  const PairsLinear::Kernel& kernel;
  int64_t tokens, cols;

  int64_t count() const { return (tokens + kernel.width - 1) / kernel.width; }
  int tokens_in(int64_t tile) const {
    return static_cast<int>(std::min<int64_t>(kernel.width, tokens - tile * kernel.width));
  }
  int width(int64_t tile) const { return PairsLinear::width_for(tokens_in(tile), kernel.width); }
  // One column more than there are: the padding of a short row names the second column of a block.
  int64_t bytes() const { return (cols + 1) * kernel.width * size_of(kernel.input); }
};

bool transpose(const Tiles& tiles, const void* x, DType dtype, char* input, int threads) {
  const int64_t shares = (tiles.cols + kTransposeCols - 1) / kTransposeCols;
  std::atomic<bool> finite{true};
  parallel(threads, [&](int thread, int team) {
    const Range share = even_share(shares, thread, team);
    const int64_t begin = share.begin * kTransposeCols;
    const int64_t end = std::min(tiles.cols, share.end * kTransposeCols);
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int64_t first = t * tiles.kernel.width;
      const char* source = static_cast<const char*>(x) + first * tiles.cols * size_of(dtype);
      if (!tiles.kernel.transpose(source, tiles.cols, tiles.tokens_in(t), tiles.width(t), begin,
                                  end, input + t * tiles.bytes()))
        finite = false;
    }
  });
  for (int64_t t = 0; t < tiles.count(); ++t) {
    const int64_t row = tiles.width(t) * size_of(tiles.kernel.input);
    char* last = input + t * tiles.bytes() + tiles.cols * row;
    std::fill(last, last + row, char{0});
  }
  return finite;
}

// Returns false, with nothing written, if an activation is not finite.
bool multiply(const PairsView& weight, const void* x, int64_t tokens, const OutputView& output,
              int64_t first_token) {
  static thread_local Scratch scratch;
  const Tiles tiles{lookup<PairsLinear>(weight.dtype), tokens, weight.cols};
  const int64_t tasks = tiles.count() * weight.row_blocks();
  const int64_t entries = weight.block_offsets[weight.row_blocks() * weight.col_blocks()];
  const int threads = threads_for((entries * 6 + weight.rows * 4) * tokens);
  char* input = static_cast<char*>(scratch.reserve(tiles.count() * tiles.bytes()));
  if (!transpose(tiles, x, weight.dtype, input, threads)) return false;
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](int, int) {
    static thread_local Scratch sums;
    void* own = sums.reserve(PairsLinear::kScratch);
    for (int64_t task = next++; task < tasks; task = next++) {
      // Tile by tile: the activations of one stay in the second-level cache, the weights stream.
      const int64_t tile = task / weight.row_blocks(), row_block = task % weight.row_blocks();
      tiles.kernel.run(weight, row_block, input + tile * tiles.bytes(), tiles.tokens_in(tile),
                       tiles.width(tile), own, output, first_token + tile * tiles.kernel.width);
    }
  });
  return true;
}

// Adds to one token's outputs what its activation `x` in column `col` contributes, as the dense
// product does: through a weight that is not stored, a non-finite activation makes a NaN.
template <class T>
void add_column(const PairsView& weight, int64_t col, float x, int64_t token,
                const OutputView& output) {
  std::vector<float> column(weight.rows, 0.0f);
  for (int64_t rb = 0; rb < weight.row_blocks(); ++rb)
    for_each_in_block<T>(weight, rb, col / weight.block_cols(),
                         [&](int64_t row, int64_t c, T value) {
                           if (c == col) column[row] = to_float(value);
                         });
  T* y = static_cast<T*>(output.values) + token * output.rows;
  for (int64_t r = 0; r < weight.rows; ++r) assign(y[r], to_float(y[r]) + column[r] * x);
}

// The kernels skip zeros, so they never see a non-finite activation: they multiply a copy in which
// zeros stand for them, and their columns are added afterwards.
template <class T>
void multiply_non_finite(const PairsView& weight, const void* x, int64_t tokens,
                         const OutputView& output, int64_t first_token) {
  const T* source = static_cast<const T*>(x);
  std::vector<T> finite(source, source + tokens * weight.cols);
  for (T& value : finite)
    if (!std::isfinite(to_float(value))) value = T{};
  multiply(weight, finite.data(), tokens, output, first_token);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < weight.cols; ++k) {
      const float value = to_float(source[t * weight.cols + k]);
      if (!std::isfinite(value)) add_column<T>(weight, k, value, first_token + t, output);
    }
}

}  // namespace

void pairs_linear(const PairsView& weight, const PairsSizes& sizes, const void* x, int64_t tokens,
                  const OutputView& output) {
  check_sizes(weight, sizes);
  for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
    const int64_t count = std::min(kTokensAtOnce, tokens - first);
    const void* source = static_cast<const char*>(x) + first * weight.cols * size_of(weight.dtype);
    if (multiply(weight, source, count, output, first)) continue;
    if (weight.dtype == DType::kFloat32)
      multiply_non_finite<float>(weight, source, count, output, first);
    else
      multiply_non_finite<BFloat16>(weight, source, count, output, first);
  }
}

}  // namespace pysparse
