#pragma once
// A sparse weight and a low-rank term that its mask cuts: M * (W + s B A), for training. Of neither
// the sum nor its gradient does more than a tile of rows ever exist: `expand` makes the rows that a
// product is about to read, `contract` takes in the gradient of these rows and leaves what it says
// about A, B and the kept weights.
//
// The dense product dY^T X of a tile is cheaper than the sampled one as long as more than some 5 %
// of the weights are kept: it runs at the machine's matrix speed, where a sampled dot gathers.
#include "pysparse/kernel_table.h"
#include "pysparse/views.h"

namespace pysparse {

struct LowRankView {
  BitmapView mask;
  const float* values;  // kept weights in row-major order; null: the low-rank term alone
  const float* up;      // B, [rows][rank]
  const float* down;    // A, [rank][cols]
  int64_t rank;         // 0: no low-rank term
  float scale;          // s
};

// Columns that one thread contracts at a time: A and its gradient stay in the first-level cache,
// and sums over columns are formed block by block in one order, whatever the number of threads.
inline constexpr int64_t kContractCols = 128;

struct LowRankGradient {
  float* up_sums;  // [rows of the tile][rank]: sums over this block's columns, written
  float* down;     // [rank][cols], added to in this block's columns
  float* values;   // [kept], written; null: not wanted
};

struct LowRank {
  static constexpr const char* op = "lowrank";
  static constexpr const char* format = "bitmap";
  struct Kernel {
    // Writes rows [begin, end) of M * (W + s B A) to tile [end - begin][cols], in the kernel's
    // type.
    void (*expand)(const LowRankView& view, int64_t begin, int64_t end, void* tile);
    // Takes in columns [first, last) of `gradient`, [end - begin][cols] in the kernel's type.
    void (*contract)(const LowRankView& view, const void* gradient, int64_t begin, int64_t end,
                     int64_t first, int64_t last, const LowRankGradient& out);
  };
};

// `tile` is [end - begin][cols] of `dtype`.
void lowrank_expand(const LowRankView& view, DType dtype, int64_t begin, int64_t end, void* tile);
// `up` is [rows][rank], of which rows [begin, end) are written; `down` [rank][cols] is added to;
// of `values` [kept] (or null) those of these rows are written.
void lowrank_contract(const LowRankView& view, DType dtype, const void* gradient, int64_t begin,
                      int64_t end, float* up, float* down, float* values);

}  // namespace pysparse
