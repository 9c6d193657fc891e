#pragma once
// The optimal brain surgeon's sweep: prune a weight column by column and make good, in the columns
// on the right, what each pruned weight does to the output.
//
// Left-looking: a block of columns is brought up to date with everything that was pruned on its
// left just before its turn, so each weight is read and written once and not once a block. The
// errors are kept as lists of what was pruned: at 50 % zeros that halves the arithmetic that a
// dense product would need.
#include "pysparse/kernel_table.h"

namespace pysparse {

inline constexpr int kObsWidth = 128;  // columns that one update writes: 8 registers of 512 bits
// Columns whose errors one update reads: 48 rows of U x 128 columns are 24 KB and stay in the
// first-level cache.
inline constexpr int kObsDepth = 48;
inline constexpr int kObsDiagonal = 64;  // most columns of a strip, and the width of its own U

// What was pruned (and, on a grid, rounded) in a strip of up to kObsDiagonal columns, row by row.
struct ObsErrors {
  float* values;     // [rows][room]: the error of a weight, what it lost / U_jj
  uint8_t* columns;  // [rows][room]: its column within the strip, ascending
  uint8_t* counts;   // [rows]
  int64_t room;      // most that a row can lose; closer lists are read faster, at every later block
};

// The int8 grid of each row and group of columns: kept weights become whole multiples of its step,
// at most 127, and what that moves them by is an error like a pruned weight's.
struct ObsGrid {
  const float* steps;  // [rows][groups], or null: kept weights stay as they are
  int64_t groups, group_cols;
};

struct ObsStrip {
  float* panel;          // the strip's first column of a row-major panel
  int64_t stride;        // of the panel
  int depth;             // columns
  const float* upper;    // U of the strip itself, [depth][kObsDiagonal], zero beyond
  const float* inverse;  // [depth]: 1 / U_jj
  uint8_t* keep;         // read (n = 0), or written where the strip chooses n of every m itself
  int64_t keep_stride;
  const float* scale;  // [depth]: the score of a weight is |w| * scale
  int n, m;
  ObsGrid grid;
  int64_t first;  // the strip's first column in the matrix
};

struct ObsSweep {
  static constexpr const char* op = "sweep";
  static constexpr const char* format = "dense";
  struct Kernel {
    // panel[r][0, kObsWidth) -= sum over the errors of row r of value * upper[column].
    void (*update)(float* panel, int64_t stride, const ObsErrors& errors, const float* upper,
                   int64_t begin, int64_t end);
    // Prunes the columns of a strip in order, for the rows [begin, end).
    void (*sweep)(const ObsStrip& strip, const ObsErrors& errors, int64_t begin, int64_t end);
  };
};

enum class ObsGroup { kRow, kMatrix, kNm };

struct ObsProblem {
  float* weight;       // [rows][cols], updated in place
  const float* upper;  // U, [cols][cols], row-major
  const float* scale;  // [cols], not negative
  uint8_t* keep;       // [rows][cols], written
  int64_t rows, cols;
  int64_t block;  // columns masked together, or for n:m a multiple of m
  ObsGroup group;
  const int64_t* counts;  // [blocks]: how many go in a block, of each row or of all rows
  int64_t blocks;
  int n, m;  // n:m only
  ObsGrid grid;
};

void obs_sweep(const ObsProblem& problem);

}  // namespace pysparse
