#pragma once
// Shapley values of embedding entries: a sample's players are the entries of its rows, one row a
// field, or these rows as wholes; what is removed takes its base value; what a removal costs is the
// growth of the log loss.
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
  bool whole_rows;        // a row goes at once: a player a field
  bool twice;             // visit and visit + 1, whose difference is squared
  const int32_t* orders;  // [samples][players], removals instead of drawn ones; may be null
};

// Players of a field, and columns of the totals.
inline int players_per_field(const EntrySamples& samples, const EntryDraw& draw) {
  return draw.whole_rows ? 1 : samples.cols;
}

// Exact sums over samples: value = (high * 2^kLowBits + low) / scale.
struct EntryTotals {
  int64_t *sums, *squares;            // [rows][players_per_field]
  int32_t *sums_high, *squares_high;  // [rows][players_per_field]
  double* bound;                      // [2], largest |sums| and squares there can be
};

struct MarginalTile {
  const float* marginals;  // [samples][fields][padded_width(cols)]
  const float* again;      // of another draw; null for one draw
  const int32_t* ids;      // [samples][fields]
  int64_t samples;
  int fields, cols;  // players of a field
};

// Of sizes that may be NaN, which is above infinity.
inline float larger(float a, float b) { return a >= b || a != a ? a : b; }

struct ShapleyFm {
  static constexpr const char* op = "shapley";
  static constexpr const char* format = "fm";
  struct Kernel {
    // Marginals of samples [begin, end), of `draw.visit` alone, into a tile; returns a bound of
    // their sizes (NaN when one is). The logit is offset + the pairs' products. `scratch` holds
    // scratch_bytes(...), aligned to 64. `soon`, if not null, are the totals that the marginals go
    // to next.
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
    // Adds the marginals of the rows in `mine` and their squares; of two draws, both and the
    // squares of their differences.
    void (*run)(const MarginalTile& tile, const EntryTotals& totals, RowRange mine);
  };
};

// Adds the samples' marginals to the totals. Throws, before any is added, for ids out of range,
// labels outside [0, 1] and shapes without kernels; for marginals that are not finite or too large
// once those of earlier samples may have been added.
void fm_shapley(const EntrySamples& samples, const EntryDraw& draw, const EntryTotals& totals);

// One sample's marginals by player, float [samples][players], without totals and of one visit.
void fm_marginals(const EntrySamples& samples, const EntryDraw& draw, float* marginals);

}  // namespace pysparse
