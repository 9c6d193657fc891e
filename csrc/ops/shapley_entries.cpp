// Factorisation machines: check, walk by tiles, add what each owner of rows has.
#include "pysparse/shapley_entries.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "shapley_totals.h"

namespace pysparse {
namespace {

constexpr double kRoom = 4611686018427387904.0;  // 2^62

void check_shape(const EntrySamples& v) {
  check(v.fields > 0 && v.cols > 0 && v.rows > 0 && v.samples >= 0, "a table of ", v.rows, " x ",
        v.cols, " and ", v.samples, " samples of ", v.fields, " fields is no game");
  check(v.cols <= kMaxEmbedding, v.cols, " columns are more than ", kMaxEmbedding);
  const int64_t padded = int64_t{v.fields} * padded_width(v.cols);
  check(padded <= kMaxPaddedPlayers, v.fields, " fields of ", v.cols, " columns are ", padded,
        " players (padded), more than ", kMaxPaddedPlayers);
}

void check_order(const int32_t* order, int64_t players, int64_t sample) {
  std::vector<bool> seen(static_cast<size_t>(players));
  for (int64_t i = 0; i < players; ++i) {
    const int32_t p = order[i];
    check(p >= 0 && p < players && !seen[static_cast<size_t>(p)], "the order of sample ", sample,
          " is no permutation of ", players, " players: ", p, " at ", i);
    seen[static_cast<size_t>(p)] = true;
  }
}

void spill(int64_t* low, int32_t* high, int64_t count, int threads) {
  parallel(threads, [&](int thread, int team) {
    const Range share = even_share(count, thread, team);
    for (int64_t i = share.begin; i < share.end; ++i) {
      const int64_t carried = low[i] >> kLowBits;
      high[i] += static_cast<int32_t>(carried);
      low[i] -= carried * (int64_t{1} << kLowBits);
    }
  });
}

// Makes sure that `growth` more fits, by moving the upper bits of all totals away.
void make_room(double& bound, double growth, int64_t* low, int32_t* high, int64_t count,
               int threads) {
  if (bound + growth > kRoom) {
    spill(low, high, count, threads);
    bound = std::ldexp(1.0, kLowBits);
  }
  bound += growth;
}

}  // namespace

float largest(const float* values, int64_t count) {
  int32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t one;
    std::memcpy(&one, values + i, sizeof one);
    bits = std::max(bits, one & 0x7fffffff);
  }
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

void check_samples(const EntrySamples& v, const EntryDraw& draw) {
  check_shape(v);
  check(draw.first <= Stream::kSamples &&
            static_cast<uint64_t>(v.samples) <= Stream::kSamples - draw.first,
        "samples ", draw.first, " + ", v.samples, " are beyond ", Stream::kSamples);
  check(draw.visit < Stream::kVisits, "visit ", draw.visit, " is beyond ", Stream::kVisits);
  for (int64_t i = 0; i < v.samples * v.fields; ++i)
    check(v.ids[i] >= 0 && v.ids[i] < v.rows, "id ", v.ids[i], " of sample ", i / v.fields,
          ", field ", i % v.fields, " is not in [0, ", v.rows, ")");
  for (int64_t i = 0; i < v.samples; ++i)
    check(v.labels[i] >= 0 && v.labels[i] <= 1, "label ", v.labels[i], " of sample ", i,
          " is not in [0, 1]");
  const int64_t players = int64_t{v.fields} * v.cols;
  if (draw.orders)
    for (int64_t i = 0; i < v.samples; ++i) check_order(draw.orders + i * players, players, i);
}

bool has_repeats(const EntrySamples& v) {
  for (int64_t s = 0; s < v.samples; ++s)
    for (int f = 1; f < v.fields; ++f)  // fields in order have rows of their own
      if (v.ids[s * v.fields + f] <= v.ids[s * v.fields + f - 1]) return true;
  return false;
}

void add_tile(const MarginalTile& tile, float peak, int64_t first, int64_t rows, bool repeated,
              int threads, const EntryTotals& totals) {
  check(peak < kLargestMarginal, "a marginal of samples ", first, " to ", first + tile.samples - 1,
        " is ", peak, "; they must be finite and below ", kLargestMarginal, " nats");
  const double often = static_cast<double>(tile.samples) * (repeated ? tile.fields : 1);
  const int64_t entries = rows * tile.cols;
  make_room(totals.bound[0], often * (double{peak} * kSumScale + 1), totals.sums, totals.sums_high,
            entries, threads);
  make_room(totals.bound[1], often * (double{peak} * peak * kSquareScale + 1), totals.squares,
            totals.squares_high, entries, threads);
  const auto& kernel = lookup<ShapleyAdd>(DType::kFloat32);
  parallel(threads, [&](int thread, int team) { kernel.run(tile, totals, thread, team); });
}

void fm_shapley(const EntrySamples& v, const EntryDraw& draw, const EntryTotals& totals) {
  check_samples(v, draw);
  const auto& kernel = lookup<ShapleyFm>(DType::kFloat32);
  const int64_t padded = int64_t{v.fields} * padded_width(v.cols);
  const int threads = threads_for(v.samples * padded * 16);
  add_samples(v, totals, threads, [&](int64_t begin, int64_t end, float* tile) {
    thread_local Scratch scratch;
    kernel.run(v, draw, begin, end, scratch.reserve(ShapleyFm::scratch_bytes(padded)), tile);
  });
}

void fm_marginals(const EntrySamples& v, const EntryDraw& draw, float* marginals) {
  check_samples(v, draw);
  const auto& kernel = lookup<ShapleyFm>(DType::kFloat32);
  const int width = padded_width(v.cols);
  Scratch scratch, memory;
  auto* tile = static_cast<float*>(
      memory.reserve(static_cast<size_t>(v.fields) * static_cast<size_t>(width) * sizeof(float)));
  void* space = scratch.reserve(ShapleyFm::scratch_bytes(int64_t{v.fields} * width));
  for (int64_t s = 0; s < v.samples; ++s) {
    kernel.run(v, draw, s, s + 1, space, tile);
    for (int f = 0; f < v.fields; ++f)
      std::copy_n(tile + f * width, v.cols, marginals + (s * v.fields + f) * v.cols);
  }
}

}  // namespace pysparse
