#pragma once
// Many small ridge problems over one Hessian: B = I + D H D with a diagonal D for each row, the
// solution v = D B^-1 D b and the diagonal of B^-1. That is one step of empirical-Bayes pruning.
#include <cstddef>

#include "pysparse/kernel_table.h"

namespace pysparse {

inline constexpr int kRidgeTile = 4;    // H is padded to a multiple of it
inline constexpr int kRidgeMax = 512;   // a packed triangle of 16 problems then takes 8.4 MB
inline constexpr int kRidgeGroup = 16;  // problems that a kernel takes at a time, at most

struct RidgeView {
  const float* gram;        // H, [padded][padded], symmetric, zero beyond size
  const float* scale;       // D, [rows][size]: sqrt(gamma) / sigma, zero for what is pruned
  const float* target;      // b, [rows][size]
  float* solution;          // v, [rows][size]
  float* inverse_diagonal;  // of B^-1, [rows][size]
  int64_t rows;
  int size, padded;
};

struct RidgeRows {
  static constexpr const char* op = "ridge";
  static constexpr const char* format = "dense";
  struct Kernel {
    size_t (*scratch_bytes)(int padded);
    // Solves the rows [begin, end), end - begin <= kRidgeGroup; scratch is aligned to 64 bytes.
    void (*run)(const RidgeView& view, int64_t begin, int64_t end, void* scratch);
  };
};

// Throws for sizes that no kernel takes. `gram` is [size][size] here; where H has a negative
// eigenvalue that D does not hide, a row's results are NaN.
void ridge_rows(const RidgeView& view);

}  // namespace pysparse
