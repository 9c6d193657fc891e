// The walk of a factorisation machine in double precision, each order by itself and each entry of a
// row by itself: the oracle.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "isa/generic.h"
#include "pysparse/shapley_draw.h"
#include "pysparse/shapley_entries.h"

namespace pysparse {
namespace {

double log_loss(double logit, double label) {
  return std::max(logit, 0.0) - label * logit + std::log1p(std::exp(-std::fabs(logit)));
}

// Removes the players in turn: dt = (c - E) (s - E) an entry, as the squares of the difference
// cancel.
void remove_in_turn(const EntrySamples& v, const EntryDraw& draw, int64_t sample,
                    const int32_t* order, bool backwards, float* marginals) {
  const int32_t* ids = v.ids + sample * v.fields;
  const int each = players_per_field(v, draw), players = v.fields * each;
  const int width = padded_width(each), entries = v.cols / each;
  const float share = draw.antithetic ? 0.5f : 1.0f;
  const auto entry = [&](int f, int k) { return double{v.table[int64_t{ids[f]} * v.cols + k]}; };
  std::vector<double> sums(static_cast<size_t>(v.cols));
  double logit = v.offset ? v.offset[sample] : 0.0, pairs = 0;
  for (int k = 0; k < v.cols; ++k) {
    for (int f = 0; f < v.fields; ++f)
      sums[static_cast<size_t>(k)] += entry(f, k), pairs -= entry(f, k) * entry(f, k);
    pairs += sums[static_cast<size_t>(k)] * sums[static_cast<size_t>(k)];
  }
  logit += 0.5 * pairs;
  double before = log_loss(logit, v.labels[sample]);
  for (int i = 0; i < players; ++i) {
    const int player = order[backwards ? players - 1 - i : i];
    const int f = player / each, first = player % each;
    for (int k = first; k < first + entries; ++k) {
      const double e = entry(f, k), delta = v.base[f * v.cols + k] - e;
      double& sum = sums[static_cast<size_t>(k)];
      logit += delta * (sum - e);
      sum += delta;
    }
    const double after = log_loss(logit, v.labels[sample]);
    marginals[f * width + first] += share * static_cast<float>(after - before);
    before = after;
  }
}

void draw_order(const Stream& stream, int players, uint32_t* partner, int32_t* order) {
  for (int i = 0; i < players; ++i) order[i] = i;
  for (int i = 0; i < players; ++i)
    partner[i] = i + uniform_below(stream, partner[i], static_cast<uint32_t>(i),
                                   static_cast<uint32_t>(players - i));
  for (int i = 0; i < players; ++i) std::swap(order[i], order[partner[i]]);
}

float run(const EntrySamples& v, const EntryDraw& draw, int64_t begin, int64_t end,
          const EntryTotals*, void* scratch, float* tile) {
  const int each = players_per_field(v, draw), players = v.fields * each;
  const int padded = v.fields * padded_width(each);
  auto* partner = static_cast<uint32_t*>(scratch);
  auto* order = reinterpret_cast<int32_t*>(partner + ShapleyDraw::padded(players));
  float peak = 0;
  for (int64_t s = begin; s < end; ++s) {
    if (draw.orders) {
      std::copy_n(draw.orders + s * players, players, order);
    } else {
      const Stream stream{draw.seed, draw.first + static_cast<uint64_t>(s), draw.visit, 0};
      for (int at = 0; at < players; at += 4) {
        uint32_t x[4] = {stream.low(), stream.high(), 0, static_cast<uint32_t>(at / 4)};
        philox(stream.key, x);
        std::copy(x, x + 4, partner + at);
      }
      draw_order(stream, players, partner, order);
    }
    float* marginals = tile + (s - begin) * padded;
    std::fill_n(marginals, padded, 0.0f);
    remove_in_turn(v, draw, s, order, false, marginals);
    if (draw.antithetic) remove_in_turn(v, draw, s, order, true, marginals);
    for (int i = 0; i < padded; ++i) peak = larger(peak, std::fabs(marginals[i]));
  }
  return peak;
}

constexpr ShapleyFm::Kernel kKernel{run};
const Register<ShapleyFm> registered{DType::kFloat32, isa::kGeneric, kKernel};

}  // namespace
}  // namespace pysparse
