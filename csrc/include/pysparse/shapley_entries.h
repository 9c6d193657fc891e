#pragma once
// Shapley values of embedding entries: a sample's players are the entries of its rows, one row a
// field; a removed entry takes its base value; what a removal costs is the growth of the log loss.
#include "pysparse/kernel_table.h"
#include "pysparse/shapley_units.h"

namespace pysparse {

struct EntrySamples {
  const float* table;   // [rows][cols]
  const float* base;    // [fields][cols]
  const int32_t* ids;   // [samples][fields]
  const float* offset;  // [samples], of the logit; may be null
  const float* labels;  // [samples], from 0 to 1
  int64_t rows, samples;
  int fields, cols;
};

struct EntryDraw {
  uint64_t seed, first;
  uint32_t visit;
  bool antithetic;        // the mean of an order and its reverse
  const int32_t* orders;  // [samples][fields * cols], removals instead of drawn ones; may be null
};

// Exact sums over samples: value = (high * 2^kLowBits + low) / scale.
struct EntryTotals {
  int64_t *sums, *squares;            // [rows][cols]
  int32_t *sums_high, *squares_high;  // [rows][cols]
  double* bound;                      // [2], largest |sums| and squares there can be
};

struct MarginalTile {
  const float* marginals;  // [samples][fields][padded_width(cols)]
  const int32_t* ids;      // [samples][fields]
  int64_t samples;
  int fields, cols;
};

// Of sizes that may be NaN, which is above infinity.
inline float larger(float a, float b) { return a >= b || a != a ? a : b; }

struct ShapleyFm {
  static constexpr const char* op = "shapley";
  static constexpr const char* format = "fm";
  struct Kernel {
    // Marginals of samples [begin, end) into a tile; returns a bound of their sizes (NaN when one
    // is). The logit is offset + the pairs' products. `scratch` holds scratch_bytes(...), aligned
    // to 64. `soon`, if not null, are the totals that the marginals go to next.
    float (*run)(const EntrySamples& samples, const EntryDraw& draw, int64_t begin, int64_t end,
                 const EntryTotals* soon, void* scratch, float* tile);
  };
  static constexpr size_t scratch_bytes(int64_t padded_players) {
    return static_cast<size_t>(padded_players + 64) * 32 + 4096;
  }
};

// Rows of the table that one thread adds to.
struct RowRange {
  int32_t begin, end;
  bool has(int32_t row) const { return row >= begin && row < end; }
};

struct ShapleyAdd {
  static constexpr const char* op = "shapley";
  static constexpr const char* format = "totals";
  struct Kernel {
    // Adds the marginals of the rows in `mine`.
    void (*run)(const MarginalTile& tile, const EntryTotals& totals, RowRange mine);
  };
};

// Adds the samples' marginals to the totals. Throws, before any is added, for ids out of range,
// labels outside [0, 1] and shapes without kernels; for marginals that are not finite or too large
// once those of earlier samples may have been added.
void fm_shapley(const EntrySamples& samples, const EntryDraw& draw, const EntryTotals& totals);

// One sample's marginals by player, float [samples][fields * cols], without totals.
void fm_marginals(const EntrySamples& samples, const EntryDraw& draw, float* marginals);

}  // namespace pysparse
