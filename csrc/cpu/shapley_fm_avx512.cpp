// The walk of a factorisation machine: O(1) a removal, dt = (c - E) (s - E). The reversed order
// sees s = s(full) + s(empty) - s(after), so it costs one fused product in the same loop, not a
// walk.
#include <algorithm>
#include <cstring>

#include "isa/avx512.h"
#include "pysparse/shapley_draw.h"
#include "pysparse/shapley_entries.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/losses_avx512.h"
#include "simd/philox_avx512.h"
namespace pysparse {
namespace {

// Arrays of one sample, laid out in the caller's scratch; players are padded.
struct Walk {
  uint32_t* partner;
  uint16_t *all, *left, *order;  // every player; those not yet removed; in order of removal
  float *delta, *bias;           // c - E and -(c - E) E
  float *forward, *backward;     // steps of the logit, then of the loss
  float *sum, *both;             // by column: of E as it is now; of E and c
};

Walk lay_out(void* scratch, int64_t padded) {
  auto* at = static_cast<unsigned char*>(scratch);
  const auto take = [&](size_t item) {
    unsigned char* mine = at;
    at += (static_cast<size_t>(padded) + 64) * item / 64 * 64;
    return mine;
  };
  Walk w;
  w.partner = reinterpret_cast<uint32_t*>(take(4));
  w.delta = reinterpret_cast<float*>(take(4));
  w.bias = reinterpret_cast<float*>(take(4));
  w.forward = reinterpret_cast<float*>(take(4));
  w.backward = reinterpret_cast<float*>(take(4));
  w.all = reinterpret_cast<uint16_t*>(take(2));
  w.left = reinterpret_cast<uint16_t*>(take(2));
  w.order = reinterpret_cast<uint16_t*>(take(2));
  w.sum = reinterpret_cast<float*>(at);
  w.both = w.sum + kMaxEmbedding;
  return w;
}

// Reads the rows of a sample; returns its logit.
inline float read_sample(const EntrySamples& v, int64_t sample, int width, const Walk& w) {
  const int32_t* ids = v.ids + sample * v.fields;
  float pairs = 0;
  for (int k = 0; k < v.cols; k += 16) {
    const auto live = static_cast<__mmask16>((1u << std::min(16, v.cols - k)) - 1);
    const auto room = static_cast<__mmask16>((1u << std::min(16, width - k)) - 1);
    __m512 sum = _mm512_setzero_ps(), both = sum, squares = sum;
    for (int f = 0; f < v.fields; ++f) {
      const __m512 e = _mm512_maskz_loadu_ps(live, v.table + int64_t{ids[f]} * v.cols + k);
      const __m512 c = _mm512_maskz_loadu_ps(live, v.base + f * v.cols + k);
      const __m512 delta = _mm512_sub_ps(c, e);
      _mm512_mask_storeu_ps(w.delta + f * width + k, room, delta);
      _mm512_mask_storeu_ps(w.bias + f * width + k, room,
                            _mm512_mul_ps(delta, _mm512_sub_ps(_mm512_setzero_ps(), e)));
      sum = _mm512_add_ps(sum, e);
      both = _mm512_add_ps(both, _mm512_add_ps(e, c));
      squares = _mm512_fmadd_ps(e, e, squares);
    }
    _mm512_mask_storeu_ps(w.sum + k, room, sum);
    _mm512_mask_storeu_ps(w.both + k, room, both);
    pairs += _mm512_reduce_add_ps(_mm512_fmsub_ps(sum, sum, squares));
  }
  return __builtin_fmaf(0.5f, pairs, v.offset ? v.offset[sample] : 0.0f);
}

template <bool kAntithetic>
inline void remove_all(const Walk& w, int players, int column_mask) {
  for (int i = 0; i < players; ++i) {
    const uint32_t j = w.partner[i];
    const uint32_t p = w.left[j], k = p & static_cast<uint32_t>(column_mask);
    w.left[j] = w.left[i];
    w.order[i] = static_cast<uint16_t>(p);
    const float delta = w.delta[p], bias = w.bias[p], before = w.sum[k], after = before + delta;
    w.sum[k] = after;
    w.forward[i] = __builtin_fmaf(delta, before, bias);
    if constexpr (kAntithetic)
      w.backward[players - 1 - i] = __builtin_fmaf(delta, w.both[k] - after, bias);
  }
}

// The same for rows that go as wholes, `cols` entries `width` apart; nothing was put behind them.
template <bool kAntithetic>
inline void remove_rows(const Walk& w, int rows, int cols, int width) {
  for (int i = 0; i < rows; ++i) {
    const uint32_t j = w.partner[i], row = w.left[j];
    w.left[j] = w.left[i];
    w.order[i] = static_cast<uint16_t>(row);
    const float *deltas = w.delta + row * width, *biases = w.bias + row * width;
    __m512 forward = _mm512_setzero_ps(), backward = forward;
    for (int k = 0; k < cols; k += 16) {
      const auto live = static_cast<__mmask16>((1u << std::min(16, cols - k)) - 1);
      const __m512 delta = _mm512_maskz_loadu_ps(live, deltas + k);
      const __m512 bias = _mm512_maskz_loadu_ps(live, biases + k);
      const __m512 before = _mm512_maskz_loadu_ps(live, w.sum + k);
      const __m512 after = _mm512_add_ps(before, delta);
      _mm512_mask_storeu_ps(w.sum + k, live, after);
      forward = _mm512_add_ps(forward, _mm512_fmadd_ps(delta, before, bias));
      if constexpr (kAntithetic) {
        const __m512 both = _mm512_maskz_loadu_ps(live, w.both + k);
        backward =
            _mm512_add_ps(backward, _mm512_fmadd_ps(delta, _mm512_sub_ps(both, after), bias));
      }
    }
    w.forward[i] = _mm512_reduce_add_ps(forward);
    if constexpr (kAntithetic) w.backward[rows - 1 - i] = _mm512_reduce_add_ps(backward);
  }
}

// Fixes the order in place of a drawn one: nothing is swapped. `each` players of a field stand
// `width` apart from the next one's.
inline void take_order(const int32_t* order, int players, int each, int width, const Walk& w) {
  for (int i = 0; i < players; ++i) {
    w.partner[i] = static_cast<uint32_t>(i);
    w.left[i] = static_cast<uint16_t>(order[i] / each * width + order[i] % each);
  }
}

// Asks for the lines that a later sample needs, a few at each call: asked for at once they would
// wait for one another, and the walk for them.
class LinesAhead {
 public:
  LinesAhead(const EntrySamples& v, int64_t sample, int calls, const EntryTotals* totals)
      : v_(v), totals_(totals), at_(v.ids + sample * v.fields), end_(at_) {
    if (sample < v.samples) end_ += v.fields;
    rows_ = (v.fields + calls - 1) / calls;
  }

  void operator()() const {
    for (int r = 0; r < rows_ && at_ != end_; ++r, ++at_) {
      const int64_t first = int64_t{*at_} * v_.cols;
      for (int k = 0; k < v_.cols; k += 16) ask<_MM_HINT_T0>(v_.table + first + k);
      if (!totals_) continue;
      for (int k = 0; k < v_.cols; k += 8) {
        ask<_MM_HINT_T1>(totals_->sums + first + k);
        ask<_MM_HINT_T1>(totals_->squares + first + k);
      }
    }
  }

 private:
  template <_mm_hint kNear>
  static void ask(const void* line) {
    _mm_prefetch(static_cast<const char*>(line), kNear);
  }

  const EntrySamples& v_;
  const EntryTotals* totals_;
  mutable const int32_t* at_;
  const int32_t* end_;
  int rows_;
};

template <bool kAntithetic, bool kRows>
float run_samples(const EntrySamples& v, const EntryDraw& draw, int64_t begin, int64_t end,
                  const EntryTotals* soon, void* scratch, float* tile) {
  const int each = kRows ? 1 : v.cols, stride = padded_width(each), padded = v.fields * stride;
  const int players = v.fields * each, width = padded_width(v.cols);
  const Walk w = lay_out(scratch, int64_t{v.fields} * width);
  for (int i = 0; i < players; ++i) w.all[i] = static_cast<uint16_t>(i / each * stride + i % each);
  float peak = 0;
  for (int64_t s = begin; s < end; ++s, tile += padded) {
    const float logit = read_sample(v, s, width, w);
    if (draw.orders) {
      take_order(draw.orders + s * players, players, each, stride, w);
    } else {
      std::memcpy(w.left, w.all, static_cast<size_t>(players) * sizeof(uint16_t));
      draw_partners({draw.seed, draw.first + static_cast<uint64_t>(s), draw.visit, 0}, players,
                    w.partner);
    }
    if constexpr (kRows)
      remove_rows<kAntithetic>(w, players, v.cols, width);
    else
      remove_all<kAntithetic>(w, players, width - 1);
    const LinesAhead ahead(v, s + 1, (players + 15) / 16, soon);
    peak = larger(peak, loss_steps(w.forward, players, logit, v.labels[s], ahead));
    if constexpr (kAntithetic) {
      peak = larger(peak, loss_steps(w.backward, players, logit, v.labels[s], [] {}));
      for (int i = 0; i < players; ++i)
        w.forward[i] = 0.5f * (w.forward[i] + w.backward[players - 1 - i]);
    }
    if (padded != players) std::memset(tile, 0, static_cast<size_t>(padded) * sizeof(float));
    for (int i = 0; i < players; ++i) tile[w.order[i]] = w.forward[i];
  }
  return peak;
}

float run(const EntrySamples& v, const EntryDraw& draw, int64_t begin, int64_t end,
          const EntryTotals* soon, void* scratch, float* tile) {
  if (draw.whole_rows)  // their totals are few: nothing to ask for ahead
    return (draw.antithetic ? run_samples<true, true> : run_samples<false, true>)(v, draw, begin,
                                                                                  end, nullptr,
                                                                                  scratch, tile);
  return (draw.antithetic ? run_samples<true, false>
                          : run_samples<false, false>)(v, draw, begin, end, soon, scratch, tile);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ShapleyFm::Kernel kKernel{run};
const Register<ShapleyFm> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
