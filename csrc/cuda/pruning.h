#pragma once
// Which weights go, and the sweep that makes good what their loss costs: the rules and the bits of
// the CPU (csrc/include/pysparse/select.h, obs.h). Device pointers and sizes as in api.h.
#include "api.h"
#include "entry.h"

namespace pysparse::cuda {

struct ScoredMatrix {
  const void* weight;  // [rows][cols], row r begins at r * stride
  const float* scale;  // [cols], not negative; null: the weights are the scores themselves
  int64_t rows, cols, stride;
  Entry entry;
};

struct Chosen {
  uint8_t* keep;  // 1 where kept, 0 where not; rows as far apart as `stride`
  void* pruned;   // the weight with zeros, laid out as it is; may be null
  int64_t stride;
};

// What makes a selection void, counted: scores that are NaN, scales below zero. Zero before.
struct Damage {
  uint32_t nan, negative;
};

// The `count` smallest of each row go; of equal scores the lower column first. With `joint` all
// rows compete, `count` of all weights go, and of equal scores the upper row comes first.
int select_rows(const ScoredMatrix& matrix, int64_t count, bool joint, const Chosen& out,
                Damage* damage, const Target& target);

// The n largest of every m columns stay, and a short group at the end of a row.
int select_nm(const ScoredMatrix& matrix, int n, int m, const Chosen& out, Damage* damage,
              const Target& target);

constexpr int kObsStrip = 128;  // most columns that are swept before the rest is brought up to date

struct ObsSweep {
  float* weight;       // [rows][cols], updated in place
  const float* upper;  // U with H^-1 = U^T U, [cols][cols], its diagonal positive
  const float* scale;  // [cols], not negative: the score is |w| * scale
  uint8_t* keep;       // [rows][cols], written
  int64_t rows, cols;
  int64_t block;          // columns masked together, or for n:m a multiple of m
  bool joint;             // all rows compete
  const int64_t* counts;  // host memory, [blocks]: how many go in a block, of each row or of all
  int n, m;               // n:m where n > 0; counts is null then
};

// `errors` is workspace, [rows][kObsStrip].
int obs_sweep(const ObsSweep& sweep, float* errors, Damage* damage, const Target& target);

}  // namespace pysparse::cuda
