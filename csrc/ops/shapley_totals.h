#pragma once
// What every walker over embedding entries shares: checks, tiles, and the exact totals.
#include <algorithm>
#include <exception>
#include <vector>

#include "pysparse/parallel.h"
#include "pysparse/scratch.h"
#include "pysparse/shapley_entries.h"

namespace pysparse {

void check_samples(const EntrySamples& samples, const EntryDraw& draw);

// How many samples a thread walks before they are added. Alone, few: the tile stays in the first
// caches and leaves the second one to the totals. In a team, enough to hide its meetings.
inline int64_t tile_samples(int64_t padded_players, int threads) {
  const int64_t floats = threads == 1 ? 5 << 10 : 20 << 10;
  return std::max<int64_t>(1, floats / std::max<int64_t>(1, padded_players));
}

bool has_repeats(const EntrySamples& samples);  // a row twice in one sample

// The rows of one of `owners`: every table row has one owner, and the samples' ids are shared out
// about evenly.
RowRange owned_rows(const EntrySamples& samples, int owner, int owners);

// One thread's part in adding tiles: the totals of its rows.
class TileAdder {
 public:
  TileAdder(const EntrySamples& samples, const EntryDraw& draw, const EntryTotals& totals,
            RowRange mine, bool repeated);

  // Adds the marginals of `count` samples from `first` on, `again` of a second draw or null, `peak`
  // a bound of their sizes. Throws for one that is not finite or too large.
  void add(const float* marginals, const float* again, float peak, int64_t first, int64_t count);

  const double* bound() const { return bound_; }

 private:
  float limit() const;
  void make_room(int which, double growth);

  const EntrySamples& samples_;
  EntryTotals totals_;
  RowRange mine_;
  int each_, draws_;
  int64_t repeats_;
  double bound_[2];  // the same in all threads: each sees every tile's peak
  const ShapleyAdd::Kernel& kernel_;
};

// What the threads of a team tell one another about the two tiles under way.
class TileReports {
 public:
  explicit TileReports(int threads)
      : threads_(threads),
        peaks_(static_cast<size_t>(2 * threads)),
        thrown_(static_cast<size_t>(2 * threads)) {}

  // compute() returns the peak of this thread's share. What it throws is kept until all have met:
  // a thread that left alone would leave the others waiting.
  template <class Compute>
  void run(int turn, int thread, const Compute& compute) {
    const auto at = static_cast<size_t>(turn * threads_ + thread);
    try {
      peaks_[at] = compute();
    } catch (...) {
      thrown_[at] = std::current_exception();
    }
  }

  // After the meeting, the same in every thread.
  float peak(int turn, int team) const {
    float result = 0;
    for (int thread = 0; thread < team; ++thread) {
      const auto at = static_cast<size_t>(turn * threads_ + thread);
      if (thrown_[at]) std::rethrow_exception(thrown_[at]);
      result = larger(result, peaks_[at]);
    }
    return result;
  }

 private:
  int threads_;
  std::vector<float> peaks_;
  std::vector<std::exception_ptr> thrown_;
};

// compute(draw, begin, end, tile) writes the marginals of samples [begin, end) and one visit, and
// returns a bound of their sizes. Every thread walks its share of a tile, meets the others, and
// adds what the tile has for its own rows while the next tile is walked into other memory: one
// meeting a tile.
template <class Compute>
void add_samples(const EntrySamples& samples, const EntryDraw& draw, const EntryTotals& totals,
                 int threads, const Compute& compute) {
  const int64_t padded = int64_t{samples.fields} * padded_width(players_per_field(samples, draw));
  const int draws = draw.twice ? 2 : 1;
  const int64_t size = std::min(tile_samples(draws * padded, threads) * threads, samples.samples);
  const bool repeated = has_repeats(samples);
  TileReports reports(threads);
  Scratch memory;
  auto* tiles = static_cast<float*>(
      memory.reserve(static_cast<size_t>(2 * draws * size * padded) * sizeof(float)));
  double bound[2] = {totals.bound[0], totals.bound[1]};
  parallel(threads, [&](int thread, int team) {
    TileAdder adder(samples, draw, totals, owned_rows(samples, thread, team), repeated);
    int turn = 0;
    for (int64_t first = 0; first < samples.samples; first += size, turn ^= 1) {
      const int64_t count = std::min(size, samples.samples - first);
      const Range share = even_share(count, thread, team);
      float* tile = tiles + turn * draws * size * padded;
      reports.run(turn, thread, [&] {
        EntryDraw one = draw;
        float peak = 0;
        for (int d = 0; d < draws; ++d, ++one.visit)
          peak = larger(peak, compute(one, first + share.begin, first + share.end,
                                      tile + (d * size + share.begin) * padded));
        return peak;
      });
      team_barrier(team);
      adder.add(tile, draw.twice ? tile + size * padded : nullptr, reports.peak(turn, team), first,
                count);
    }
    if (thread == 0) std::copy_n(adder.bound(), 2, bound);
  });
  std::copy_n(bound, 2, totals.bound);
}

}  // namespace pysparse
