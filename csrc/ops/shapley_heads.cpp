// Deep heads: the coalitions of a walk are rows of dense products, one permutation after the other.
#include "pysparse/shapley_heads.h"

#include <cmath>
#include <utility>
#include <vector>

#include "packed_product.h"
#include "pysparse/shapley_draw.h"
#include "shapley_totals.h"

namespace pysparse {
namespace {

constexpr int64_t kRows = 60;  // coalitions at a time: whole tiles of 6 rows, activations in the L2

using Floats = std::vector<float>;

Floats floats(int64_t count) { return Floats(static_cast<size_t>(count)); }

// Sixteen sums: a single one would wait for itself.
float dot(const float* a, const float* b, int64_t count) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int k = 0; k < 16; ++k) sums[k] += a[i + k] * b[i + k];
  float total = 0;
  for (; i < count; ++i) total += a[i] * b[i];
  for (const float sum : sums) total += sum;
  return total;
}

double log_loss(double logit, double label) {
  return std::max(logit, 0.0) - label * logit + std::log1p(std::exp(-std::fabs(logit)));
}

struct Layer {
  PackedProduct product;
  const float* bias;
};

// A linear map of x0 that follows removals: state += delta * column of the player.
struct Lead {
  Floats columns;  // [D][width]
  int64_t width = 0;

  template <class Weight>
  Lead(int64_t inputs, int64_t outputs, const Weight& w)
      : columns(floats(inputs * outputs)), width(outputs) {
    float* at = columns.data();
    for (int64_t p = 0; p < inputs; ++p)
      for (int64_t o = 0; o < outputs; ++o) *at++ = w(p, o);
  }
  void move(float* state, int64_t player, float delta) const {
    const float* column = columns.data() + player * width;
    for (int64_t o = 0; o < width; ++o) state[o] += delta * column[o];
  }
};

// A head made ready: weights packed, views into the caller's arrays for the rest.
struct Head {
  HeadView view;
  int64_t inputs;
  std::vector<Lead> leads;  // of the first cross, of the first MLP layer where it reads x0
  bool cross_lead = false, mlp_lead = false;
  std::vector<Layer> layers;  // MLP layers without a lead
  const float* first_bias = nullptr;
  const float* final_weight = nullptr;
  float final_bias = 0;
  std::vector<PackedProduct> full;            // crosses after the first
  std::vector<PackedProduct> down, core, up;  // of the mixture; core: an expert each
  int64_t widest = 0, narrow = 0;             // activations of the MLP; experts * rank
};

void check_count(const FloatArray& array, int64_t wanted, const char* name) {
  check(array.count == wanted, name, " has ", array.count, " numbers, the shape asks for ", wanted);
}

void check_head(const HeadView& v, int64_t inputs) {
  check(v.hidden >= 0 && v.crosses >= 0, "negative numbers of layers");
  const bool any = v.cross != Cross::kNone;
  check(any == (v.crosses > 0), "a kind of cross layers needs layers, and layers a kind");
  const bool stacked = any && v.cross_out.count == 0;
  check(v.cross_out.count == 0 || v.cross_out.count == inputs, "cross_out has ", v.cross_out.count,
        " numbers for ", inputs, " inputs");
  int64_t in = inputs, count = 0;
  for (int64_t l = 0; l < v.hidden; ++l) {
    check(v.widths[l] > 0 && v.widths[l] <= 65536, "a hidden layer of width ", v.widths[l]);
    count += v.widths[l] * (in + 1);
    in = v.widths[l];
  }
  check(v.hidden > 0 || stacked || v.mlp.count == 0, "a head without hidden layers reads x_L only");
  const bool final = v.hidden > 0 || stacked;
  check_count(v.mlp, count + (final ? in + 1 : 0), "mlp");
  if (!any) return;
  check_count(v.cross_bias, v.crosses * inputs, "cross_bias");
  if (v.cross == Cross::kFull)
    return check_count(v.cross_weight, v.crosses * inputs * inputs, "cross_weight");
  check(v.experts > 0 && v.rank > 0 && v.experts * v.rank <= 65536, v.experts, " experts of rank ",
        v.rank);
  check_count(v.cross_weight, v.crosses * v.experts * v.rank * (2 * inputs + v.rank),
              "cross_weight");
  check_count(v.gates, v.experts * inputs, "gates");
}

void add_mlp(Head& head) {
  const HeadView& v = head.view;
  const float* at = v.mlp.values;
  const bool stacked = v.cross != Cross::kNone && v.cross_out.count == 0;
  int64_t in = head.inputs;
  for (int64_t l = 0; l < v.hidden; ++l) {
    const int64_t out = v.widths[l];
    const auto weight = [at, in](int64_t k, int64_t c) { return at[c * in + k]; };
    const float* bias = at + out * in;
    if (l == 0 && !stacked) {
      head.leads.emplace_back(in, out, weight);
      head.mlp_lead = true;
      head.first_bias = bias;
    } else {
      head.layers.push_back({PackedProduct(in, out, weight), bias});
    }
    at = bias + out;
    in = out;
    head.widest = std::max(head.widest, out);
  }
  if (v.mlp.count == 0) return;
  head.final_weight = at;
  head.final_bias = at[in];
}

void add_crosses(Head& head) {
  const HeadView& v = head.view;
  const int64_t d = head.inputs, rank = v.rank, er = v.experts * rank;
  if (v.cross == Cross::kNone) return;
  head.cross_lead = true;
  const float* at = v.cross_weight.values;
  for (int64_t l = 0; l < v.crosses; ++l) {
    if (v.cross == Cross::kFull) {
      const auto weight = [at, d](int64_t k, int64_t c) { return at[c * d + k]; };
      if (l == 0)
        head.leads.emplace_back(d, d, weight);
      else
        head.full.emplace_back(d, d, weight);
      at += d * d;
      continue;
    }
    const float *u = at, *c = u + er * d, *w = c + er * rank;
    const auto down = [=](int64_t k, int64_t o) { return w[(o / rank * d + k) * rank + o % rank]; };
    if (l == 0)
      head.leads.emplace_back(d, er, down);
    else
      head.down.emplace_back(d, er, down);
    for (int64_t e = 0; e < v.experts; ++e)
      head.core.emplace_back(rank, rank,
                             [=](int64_t k, int64_t o) { return c[(e * rank + o) * rank + k]; });
    head.up.emplace_back(
        er, d, [=](int64_t k, int64_t o) { return u[(k / rank * d + o) * rank + k % rank]; });
    at = w + er * d;
  }
  head.narrow = er;
}

Head make_head(const HeadView& view, int64_t inputs) {
  check_head(view, inputs);
  Head head;
  head.view = view;
  head.inputs = inputs;
  add_crosses(head);
  add_mlp(head);
  return head;
}

// The rows of one thread.
struct Block {
  Floats x0, x, linear, hidden, next, narrow, core;
  std::vector<Floats> lead_rows, lead_states;
  Floats present;  // [D], the entries as they are now
  float pairs[kRows];
  double logits[kRows];

  explicit Block(const Head& head)
      : x0(floats(kRows * head.inputs)),
        x(floats(head.cross_lead ? kRows * head.inputs : 0)),
        linear(x.size()),
        hidden(floats(kRows * head.widest)),
        next(hidden.size()),
        narrow(floats(kRows * head.narrow)),
        core(narrow.size()),
        present(floats(head.inputs)) {
    for (const Lead& lead : head.leads) {
      lead_rows.push_back(floats(kRows * lead.width));
      lead_states.push_back(floats(lead.width));
    }
  }
};

void full_crosses(const Head& head, Block& b, int64_t rows) {
  const int64_t d = head.inputs;
  for (int64_t l = 0; l < head.view.crosses; ++l) {
    const float* from = b.lead_rows[0].data();
    if (l > 0) {
      head.full[static_cast<size_t>(l - 1)].run(b.x.data(), d, rows, b.linear.data(), d);
      from = b.linear.data();
    }
    const float* bias = head.view.cross_bias.values + l * d;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = r * d; i < (r + 1) * d; ++i)
        b.x[static_cast<size_t>(i)] += b.x0[static_cast<size_t>(i)] * (from[i] + bias[i - r * d]);
  }
}

void mixture_crosses(const Head& head, Block& b, int64_t rows) {
  const HeadView& v = head.view;
  const int64_t d = head.inputs, er = head.narrow;
  for (int64_t l = 0; l < v.crosses; ++l) {
    const float* low = b.lead_rows[0].data();
    if (l > 0) {
      head.down[static_cast<size_t>(l - 1)].run(b.x.data(), d, rows, b.narrow.data(), er);
      low = b.narrow.data();
    }
    for (int64_t i = 0; i < rows * er; ++i) b.narrow[static_cast<size_t>(i)] = std::tanh(low[i]);
    for (int64_t e = 0; e < v.experts; ++e)
      head.core[static_cast<size_t>(l * v.experts + e)].run(b.narrow.data() + e * v.rank, er, rows,
                                                            b.core.data() + e * v.rank, er);
    float gate_sum[kRows];
    for (int64_t r = 0; r < rows; ++r) {
      gate_sum[r] = 0;
      for (int64_t e = 0; e < v.experts; ++e) {
        const float gate = dot(v.gates.values + e * d, b.x.data() + r * d, d);
        gate_sum[r] += gate;
        float* mine = b.core.data() + r * er + e * v.rank;
        for (int64_t k = 0; k < v.rank; ++k) mine[k] = gate * std::tanh(mine[k]);
      }
    }
    head.up[static_cast<size_t>(l)].run(b.core.data(), er, rows, b.linear.data(), d);
    const float* bias = v.cross_bias.values + l * d;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < d; ++i) {
        const auto at = static_cast<size_t>(r * d + i);
        b.x[at] += b.x0[at] * (b.linear[at] + gate_sum[r] * bias[i]);
      }
  }
}

void rectify(float* rows, int64_t count, int64_t width, const float* bias) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < width; ++i) {
      const float value = rows[r * width + i] + bias[i];
      rows[r * width + i] = value > 0.0f ? value : 0.0f;
    }
}

// The logits of `rows` coalitions, without the offset.
void finish(const Head& head, Block& b, int64_t rows) {
  const int64_t d = head.inputs;
  if (head.cross_lead) {
    std::copy_n(b.x0.data(), rows * d, b.x.data());
    (head.view.cross == Cross::kFull ? full_crosses : mixture_crosses)(head, b, rows);
  }
  const float* active = head.cross_lead ? b.x.data() : b.x0.data();
  int64_t width = d;
  if (head.mlp_lead) {
    width = head.leads.back().width;
    rectify(b.lead_rows.back().data(), rows, width, head.first_bias);
    active = b.lead_rows.back().data();
  }
  for (const Layer& layer : head.layers) {
    layer.product.run(active, width, rows, b.next.data(), layer.product.cols());
    width = layer.product.cols();
    rectify(b.next.data(), rows, width, layer.bias);
    std::swap(b.hidden, b.next);
    active = b.hidden.data();
  }
  for (int64_t r = 0; r < rows; ++r) {
    b.logits[r] = b.pairs[r];
    if (head.final_weight)
      b.logits[r] += head.final_bias + dot(head.final_weight, active + r * width, width);
    if (head.view.cross_out.count)
      b.logits[r] += dot(head.view.cross_out.values, b.x.data() + r * d, d);
  }
}

// The state that removals change, at the full coalition.
void start(const Head& head, const EntrySamples& v, int64_t sample, Block& b,
           std::vector<double>& sums, double& squares) {
  std::fill(sums.begin(), sums.end(), 0.0);
  squares = 0;
  for (int f = 0; f < v.fields; ++f)
    for (int k = 0; k < v.cols; ++k) {
      const float e = v.table[int64_t{v.ids[sample * v.fields + f]} * v.cols + k];
      b.present[static_cast<size_t>(f * v.cols + k)] = e;
      sums[static_cast<size_t>(k)] += e;
      squares += double{e} * e;
    }
  for (size_t i = 0; i < head.leads.size(); ++i) {
    std::fill(b.lead_states[i].begin(), b.lead_states[i].end(), 0.0f);
    for (int64_t p = 0; p < head.inputs; ++p)
      head.leads[i].move(b.lead_states[i].data(), p, b.present[static_cast<size_t>(p)]);
  }
}

void put_row(const Head& head, Block& b, int64_t row, const std::vector<double>& sums,
             double squares) {
  double pairs = -squares;
  for (const double sum : sums) pairs += sum * sum;
  b.pairs[row] = head.view.pairs ? static_cast<float>(0.5 * pairs) : 0.0f;
  if (head.cross_lead)
    std::copy(b.present.begin(), b.present.end(), b.x0.data() + row * head.inputs);
  for (size_t i = 0; i < head.leads.size(); ++i)
    std::copy(b.lead_states[i].begin(), b.lead_states[i].end(),
              b.lead_rows[i].data() + row * head.leads[i].width);
}

void remove_in_turn(const Head& head, const EntrySamples& v, const EntryDraw& draw, int64_t sample,
                    const int32_t* order, bool backwards, Block& b, float* marginals) {
  const int each = players_per_field(v, draw), width = padded_width(each), entries = v.cols / each;
  const int64_t players = int64_t{v.fields} * each;
  const float share = draw.antithetic ? 0.5f : 1.0f;
  const double offset = v.offset ? v.offset[sample] : 0.0, label = v.labels[sample];
  std::vector<double> sums(static_cast<size_t>(v.cols));
  double squares = 0, before = 0;
  start(head, v, sample, b, sums, squares);
  int64_t row = 0, first = 0;
  for (int64_t i = 0; i <= players; ++i) {  // state i: i players are gone
    const int64_t gone = i > 0 ? order[backwards ? players - i : i - 1] : 0;
    for (int64_t p = gone * entries; i > 0 && p < (gone + 1) * entries; ++p) {
      float& entry = b.present[static_cast<size_t>(p)];
      const float delta = v.base[p] - entry;
      squares += double{v.base[p]} * v.base[p] - double{entry} * entry;
      sums[static_cast<size_t>(p % v.cols)] += delta;
      entry = v.base[p];
      for (size_t l = 0; l < head.leads.size(); ++l)
        head.leads[l].move(b.lead_states[l].data(), p, delta);
    }
    put_row(head, b, row++, sums, squares);
    if (row < kRows && i < players) continue;
    finish(head, b, row);
    for (int64_t r = 0; r < row; ++r) {
      const double after = log_loss(offset + b.logits[r], label);
      if (first + r > 0) {
        const int64_t step = first + r - 1, p = order[backwards ? players - 1 - step : step];
        marginals[p / each * width + p % each] += share * static_cast<float>(after - before);
      }
      before = after;
    }
    first += row;
    row = 0;
  }
}

void walk_samples(const Head& head, const EntrySamples& v, const EntryDraw& draw, int64_t begin,
                  int64_t end, float* tile) {
  const int each = players_per_field(v, draw);
  const int64_t players = int64_t{v.fields} * each, padded = int64_t{v.fields} * padded_width(each);
  const auto& kernel = lookup<ShapleyDraw>(DType::kFloat32);
  Block block(head);
  std::vector<uint32_t> partner(static_cast<size_t>(ShapleyDraw::padded(players)));
  std::vector<int32_t> order(static_cast<size_t>(players));
  for (int64_t s = begin; s < end; ++s) {
    if (draw.orders) {
      std::copy_n(draw.orders + s * players, players, order.begin());
    } else {
      kernel.partners({draw.seed, draw.first + static_cast<uint64_t>(s), draw.visit, 0}, players,
                      partner.data());
      for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
      for (size_t i = 0; i < order.size(); ++i) std::swap(order[i], order[partner[i]]);
    }
    float* marginals = tile + (s - begin) * padded;
    std::fill_n(marginals, padded, 0.0f);
    remove_in_turn(head, v, draw, s, order.data(), false, block, marginals);
    if (draw.antithetic) remove_in_turn(head, v, draw, s, order.data(), true, block, marginals);
  }
}

}  // namespace

void head_shapley(const EntrySamples& v, const EntryDraw& draw, const HeadView& view,
                  const EntryTotals& totals) {
  check_samples(v, draw);
  const Head head = make_head(view, int64_t{v.fields} * v.cols);
  const int threads = static_cast<int>(std::clamp<int64_t>(v.samples, 1, num_threads()));
  const int64_t padded = int64_t{v.fields} * padded_width(players_per_field(v, draw));
  add_samples(v, draw, totals, threads,
              [&](const EntryDraw& one, int64_t begin, int64_t end, float* tile) {
                float peak = 0;
                if (begin == end) return peak;
                walk_samples(head, v, one, begin, end, tile);
                for (int64_t i = 0; i < (end - begin) * padded; ++i)
                  peak = larger(peak, std::fabs(tile[i]));
                return peak;
              });
}

void head_marginals(const EntrySamples& v, const EntryDraw& draw, const HeadView& view,
                    float* marginals) {
  check_samples(v, draw);
  const Head head = make_head(view, int64_t{v.fields} * v.cols);
  const int each = players_per_field(v, draw), width = padded_width(each);
  Floats tile = floats(int64_t{v.fields} * width);
  for (int64_t s = 0; s < v.samples; ++s) {
    walk_samples(head, v, draw, s, s + 1, tile.data());
    for (int f = 0; f < v.fields; ++f)
      std::copy_n(tile.data() + f * width, each, marginals + (s * v.fields + f) * each);
  }
}

}  // namespace pysparse
