#pragma once
// Shapley values of embedding entries (csrc/include/pysparse/shapley_entries.h): the same random
// numbers, walks and sums as on the CPU. Plain device pointers and sizes as in api.h.
#include "api.h"

namespace pysparse::cuda {

// Row r of `cols` is drawn by the stream of sample first + r.
struct ShapleyDraw {
  uint64_t seed, first;
  uint32_t visit, purpose;
  int64_t rows, cols;
};
int shapley_words(const ShapleyDraw& draw, uint32_t* words, const Target& target);
// Random orders of 0 .. cols - 1. `room` holds as many words as `orders`.
int shapley_permutations(const ShapleyDraw& draw, uint32_t* room, int32_t* orders,
                         const Target& target);

struct FmSamples {
  const float* table;   // [rows][cols]
  const float* base;    // [fields][cols]: what an absent entry is replaced by
  const int32_t* ids;   // [samples][fields], below the table's rows
  const float* offset;  // [samples], of the logit; may be null
  const float* labels;  // [samples]
  int64_t samples;
  int fields, cols;
};

struct FmOrders {
  uint64_t seed, first;
  uint32_t visit;
  bool antithetic;
  const int32_t* orders;  // [samples][fields * cols], removals instead of drawn ones; may be null
};

// Bytes of shared memory that the walk of one sample takes.
int64_t fm_walk_bytes(int fields, int cols);

// marginals [samples][fields * cols]. The bits of the largest |marginal| are joined to *peak (a NaN
// is above infinity), which is zero before.
int fm_marginals(const FmSamples& samples, const FmOrders& orders, float* marginals, uint32_t* peak,
                 const Target& target);

struct MarginalSums {
  int64_t *sums, *squares;  // [rows][cols]
};
// Adds marginals, as whole numbers, to the totals of their rows; each total must have the room.
int add_marginals(const float* marginals, const int32_t* ids, int64_t samples, int fields, int cols,
                  const MarginalSums& totals, const Target& target);

}  // namespace pysparse::cuda
