#pragma once
// What every walker over embedding entries shares: checks, tiles, and the exact totals.
#include <algorithm>
#include <vector>

#include "pysparse/parallel.h"
#include "pysparse/scratch.h"
#include "pysparse/shapley_entries.h"

namespace pysparse {

void check_samples(const EntrySamples& samples, const EntryDraw& draw);

// How many samples a tile has: enough to hide the two meetings of the threads, and small enough for
// the second-level cache.
inline int64_t tile_samples(int64_t padded_players, int threads) {
  constexpr int64_t kFloats = 96 << 10;
  return std::max<int64_t>(1, kFloats / std::max<int64_t>(1, padded_players)) * threads;
}

// Adds a tile that a team has computed, `peak` its largest marginal. Throws for one that is not
// finite or too large.
void add_tile(const MarginalTile& tile, float peak, int64_t first, int64_t rows, bool repeated,
              int threads, const EntryTotals& totals);

// The largest absolute value; NaN is above infinity.
float largest(const float* values, int64_t count);

bool has_repeats(const EntrySamples& samples);  // a row twice in one sample

// compute(begin, end, tile) writes the marginals of samples [begin, end).
template <class Compute>
void add_samples(const EntrySamples& samples, const EntryTotals& totals, int threads,
                 const Compute& compute) {
  const int64_t padded = int64_t{samples.fields} * padded_width(samples.cols);
  const int64_t size = tile_samples(padded, threads);
  const bool repeated = has_repeats(samples);
  std::vector<float> peaks(static_cast<size_t>(threads));
  Scratch memory;
  auto* tile = static_cast<float*>(memory.reserve(
      static_cast<size_t>(std::min(size, samples.samples) * padded) * sizeof(float)));
  for (int64_t first = 0; first < samples.samples; first += size) {
    const int64_t count = std::min(size, samples.samples - first);
    std::fill(peaks.begin(), peaks.end(), 0.0f);
    parallel(threads, [&](int thread, int team) {
      const Range share = even_share(count, thread, team);
      float* mine = tile + share.begin * padded;
      compute(first + share.begin, first + share.end, mine);
      peaks[static_cast<size_t>(thread)] = largest(mine, (share.end - share.begin) * padded);
    });
    add_tile({tile, samples.ids + first * samples.fields, count, samples.fields, samples.cols},
             largest(peaks.data(), threads), first, samples.rows, repeated, threads, totals);
  }
}

}  // namespace pysparse
