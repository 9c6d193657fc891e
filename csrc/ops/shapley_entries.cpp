// Factorisation machines: check, walk by tiles, add what each owner of rows has.
#include "pysparse/shapley_entries.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "shapley_totals.h"

namespace pysparse {
namespace {

constexpr double kRoom = 4611686018427387904.0;  // 2^62
constexpr double kMostAtOnce = kRoom / 2;        // beside what a total keeps when it is spilled

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

void spill(int64_t* low, int32_t* high, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t carried = low[i] >> kLowBits;
    high[i] += static_cast<int32_t>(carried);
    low[i] -= carried * (int64_t{1} << kLowBits);
  }
}

// Kept from the message, so that a check of many ids is a comparison a piece.
void check_ids(const EntrySamples& v) {
  uint32_t highest = 0;  // a negative id is above all others
  for (int64_t i = 0; i < v.samples * v.fields; ++i)
    highest = std::max(highest, static_cast<uint32_t>(v.ids[i]));
  if (v.samples * v.fields == 0 || highest < static_cast<uint64_t>(v.rows)) return;
  for (int64_t i = 0; i < v.samples * v.fields; ++i)
    check(v.ids[i] >= 0 && v.ids[i] < v.rows, "id ", v.ids[i], " of sample ", i / v.fields,
          ", field ", i % v.fields, " is not in [0, ", v.rows, ")");
}

}  // namespace

void check_samples(const EntrySamples& v, const EntryDraw& draw) {
  check_shape(v);
  check(draw.first <= Stream::kSamples &&
            static_cast<uint64_t>(v.samples) <= Stream::kSamples - draw.first,
        "samples ", draw.first, " + ", v.samples, " are beyond ", Stream::kSamples);
  const uint32_t last = draw.visit + (draw.twice ? 1 : 0);
  check(draw.visit < Stream::kVisits && last < Stream::kVisits, "visit ", last, " is beyond ",
        Stream::kVisits);
  check_ids(v);
  for (int64_t i = 0; i < v.samples; ++i)
    check(v.labels[i] >= 0 && v.labels[i] <= 1, "label ", v.labels[i], " of sample ", i,
          " is not in [0, 1]");
  const int64_t players = int64_t{v.fields} * players_per_field(v, draw);
  if (draw.orders)
    for (int64_t i = 0; i < v.samples; ++i) check_order(draw.orders + i * players, players, i);
}

bool has_repeats(const EntrySamples& v) {
  bool found = false;
  for (int64_t s = 0; s < v.samples && !found; ++s) {
    const int32_t* ids = v.ids + s * v.fields;
    for (int f = 1; f < v.fields; ++f) found |= ids[f] <= ids[f - 1];  // rows of their own ascend
  }
  return found;
}

RowRange owned_rows(const EntrySamples& v, int owner, int owners) {
  const auto rows = static_cast<int32_t>(std::min<int64_t>(v.rows, INT32_MAX));
  if (owners == 1) return {0, rows};
  constexpr int64_t kSampled = 1024;  // ids an owner
  const int64_t wanted = std::min(v.samples, kSampled * owners / v.fields + 1) * v.fields;
  std::vector<int32_t> ids(v.ids, v.ids + wanted);
  std::sort(ids.begin(), ids.end());
  const auto edge = [&](int of) {
    if (of == 0 || wanted == 0) return of == 0 ? 0 : rows;
    return of == owners ? rows : ids[static_cast<size_t>(wanted * of / owners)];
  };
  return {edge(owner), edge(owner + 1)};
}

TileAdder::TileAdder(const EntrySamples& samples, const EntryDraw& draw, const EntryTotals& totals,
                     RowRange mine, bool repeated)
    : samples_(samples),
      totals_(totals),
      mine_(mine),
      each_(players_per_field(samples, draw)),
      draws_(draw.twice ? 2 : 1),
      repeats_(repeated ? samples.fields : 1),
      bound_{totals.bound[0], totals.bound[1]},
      kernel_(lookup<ShapleyAdd>(DType::kFloat32)) {}

// Twice a marginal is squared of two draws, and a row may take many of one sample.
float TileAdder::limit() const {
  return kLargestMarginal / static_cast<float>(draws_ * std::sqrt(static_cast<double>(repeats_)));
}

// Makes sure that `growth` more fits, by moving the upper bits of the totals away.
void TileAdder::make_room(int which, double growth) {
  if (bound_[which] + growth > kRoom) {
    spill(which ? totals_.squares : totals_.sums, which ? totals_.squares_high : totals_.sums_high,
          int64_t{mine_.begin} * each_, int64_t{mine_.end} * each_);
    bound_[which] = std::ldexp(1.0, kLowBits);
  }
  bound_[which] += growth;
}

void TileAdder::add(const float* marginals, const float* again, float peak, int64_t first,
                    int64_t count) {
  check(peak < limit(), "a marginal of samples ", first, " to ", first + count - 1, " is ", peak,
        "; they must be finite and below ", limit(), " nats");
  const double often = static_cast<double>(repeats_), most = double{peak} * draws_;
  const double growth[2] = {often * (most * kSumScale + 2),
                            often * (most * most * kSquareScale + 1)};
  const int64_t padded = int64_t{samples_.fields} * padded_width(each_);
  const auto piece = static_cast<int64_t>(kMostAtOnce / std::max(growth[0], growth[1]));
  for (int64_t at = 0; at < count; at += piece) {  // usually one
    const int64_t some = std::min(piece, count - at);
    for (int which : {0, 1}) make_room(which, static_cast<double>(some) * growth[which]);
    const int32_t* ids = samples_.ids + (first + at) * samples_.fields;
    kernel_.run({marginals + at * padded, again ? again + at * padded : nullptr, ids, some,
                 samples_.fields, each_},
                totals_, mine_);
  }
}

void fm_shapley(const EntrySamples& v, const EntryDraw& draw, const EntryTotals& totals) {
  check_samples(v, draw);
  const auto& kernel = lookup<ShapleyFm>(DType::kFloat32);
  const int64_t padded = int64_t{v.fields} * padded_width(v.cols);
  const int threads = threads_for(v.samples * padded * 16);
  // A thread alone adds what it has just walked; in a team it will add rows of its own.
  const EntryTotals* soon = threads == 1 ? &totals : nullptr;
  add_samples(v, draw, totals, threads,
              [&](const EntryDraw& one, int64_t begin, int64_t end, float* tile) {
                thread_local Scratch scratch;
                void* space = scratch.reserve(ShapleyFm::scratch_bytes(padded));
                return kernel.run(v, one, begin, end, soon, space, tile);
              });
}

void fm_marginals(const EntrySamples& v, const EntryDraw& draw, float* marginals) {
  check_samples(v, draw);
  const auto& kernel = lookup<ShapleyFm>(DType::kFloat32);
  const int each = players_per_field(v, draw), width = padded_width(each);
  Scratch scratch, memory;
  auto* tile = static_cast<float*>(
      memory.reserve(static_cast<size_t>(v.fields) * static_cast<size_t>(width) * sizeof(float)));
  const int64_t padded = int64_t{v.fields} * padded_width(v.cols);
  void* space = scratch.reserve(ShapleyFm::scratch_bytes(padded));
  for (int64_t s = 0; s < v.samples; ++s) {
    kernel.run(v, draw, s, s + 1, nullptr, space, tile);
    for (int f = 0; f < v.fields; ++f)
      std::copy_n(tile + f * width, each, marginals + (s * v.fields + f) * each);
  }
}

}  // namespace pysparse
