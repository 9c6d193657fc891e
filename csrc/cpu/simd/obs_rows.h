// The sweep over rows, for any vector width. Included inside a target region; `V` has kLanes, the
// type Vector, and load, store, broadcast and subtract_product(a, b, c) = c - a * b.

namespace pysparse {
namespace {

constexpr int kUnrolled = 8;  // accumulators, enough to hide the latency of a fused multiply-add

template <class V>
void update_rows(float* panel, int64_t stride, const ObsErrors& errors, const float* upper,
                 int64_t begin, int64_t end) {
  constexpr int kPart = kUnrolled * V::kLanes;
  for (int64_t r = begin; r < end; ++r) {
    const float* values = errors.values + r * errors.room;
    const uint8_t* columns = errors.columns + r * errors.room;
    const int count = errors.counts[r];
    for (int part = 0; part < kObsWidth; part += kPart) {
      float* target = panel + r * stride + part;
      typename V::Vector sums[kUnrolled];
#pragma GCC unroll 8
      for (int v = 0; v < kUnrolled; ++v) sums[v] = V::load(target + v * V::kLanes);
      for (int i = 0; i < count; ++i) {
        const auto error = V::broadcast(values[i]);
        const float* row = upper + columns[i] * kObsWidth + part;
#pragma GCC unroll 8
        for (int v = 0; v < kUnrolled; ++v)
          sums[v] = V::subtract_product(error, V::load(row + v * V::kLanes), sums[v]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kUnrolled; ++v) V::store(target + v * V::kLanes, sums[v]);
    }
  }
}

// Which of m weights, as bits, are not among the n with the largest scores; of equal scores the
// lower column goes first. kGroup is m where it is known beforehand, so that the loops vanish.
template <int kGroup>
uint64_t choose(const float* w, const float* scale, int n, int m) {
  const int size = kGroup ? kGroup : m;
  float scores[kObsDiagonal];
  uint64_t gone = 0;
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) scores[i] = __builtin_fabsf(w[i]) * scale[i];
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) {
    int before = 0;
#pragma GCC unroll 8
    for (int j = 0; j < i; ++j) before += scores[j] <= scores[i];
#pragma GCC unroll 8
    for (int j = i + 1; j < size; ++j) before += scores[j] < scores[i];
    gone |= uint64_t{before < size - n} << i;
  }
  return gone;
}

inline uint64_t choose_any(const float* w, const float* scale, int n, int m) {
  if (m == 4) return choose<4>(w, scale, n, m);
  if (m == 8) return choose<8>(w, scale, n, m);
  return choose<0>(w, scale, n, m);
}

inline uint64_t zeros_of(const uint8_t* keep, int count) {
  uint64_t gone = 0;
  for (int i = 0; i < count; i += 8) {
    uint64_t bytes = 0x0101010101010101u;  // what lies beyond is kept
    std::memcpy(&bytes, keep + i, static_cast<size_t>(std::min(8, count - i)));
    // Gathers the lowest bit of each byte in the uppermost byte, the first byte lowest.
    gone |= (~bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56 << i;
  }
  return gone;
}

// Code times step of the nearest point of a row's grid; ties to even, at most 127 steps.
inline float on_grid(const ObsStrip& strip, int64_t row, int column, float w) {
  const float step =
      strip.grid.steps[row * strip.grid.groups + (strip.first + column) / strip.grid.group_cols];
  if (step == 0.0f) return 0.0f;
  // Adding and subtracting 1.5 * 2^23 rounds to nearest even.
  constexpr float kRounder = 12582912.0f;
  const float code = std::clamp(w / step, -127.0f, 127.0f) + kRounder - kRounder;
  return code * step;
}

// One row of a strip, in memory that whole registers may touch.
template <class V>
struct RowState {
  alignas(64) float w[kObsDiagonal] = {};
  float* values;
  uint8_t* columns;
  int count;

  void open(const ObsStrip& strip, const ObsErrors& errors, int64_t r) {
    const float* row = strip.panel + r * strip.stride;
    int c = 0;
    for (; c + V::kLanes <= strip.depth; c += V::kLanes) V::store(w + c, V::load(row + c));
    for (; c < strip.depth; ++c) w[c] = row[c];
    values = errors.values + r * errors.room;
    columns = errors.columns + r * errors.room;
    count = 0;
  }
  void close(const ObsStrip& strip, const ObsErrors& errors, int64_t r) const {
    float* row = strip.panel + r * strip.stride;
    int c = 0;
    for (; c + V::kLanes <= strip.depth; c += V::kLanes) V::store(row + c, V::load(w + c));
    for (; c < strip.depth; ++c) row[c] = w[c];
    errors.counts[r] = static_cast<uint8_t>(count);
  }
  // Settles the column of the lowest bit of `open`, and clears the bit: it goes, or on a grid is
  // rounded.
  void settle_first(const ObsStrip& strip, int64_t row, uint64_t gone, uint64_t& open) {
    const int j = __builtin_ctzll(open);
    open &= open - 1;
    const float settled = gone >> j & 1 ? 0.0f : on_grid(strip, row, j, w[j]);
    const float error = (w[j] - settled) * strip.inverse[j];
    values[count] = error;
    columns[count++] = static_cast<uint8_t>(j);
    const auto factor = V::broadcast(error);
    const float* upper = strip.upper + j * kObsDiagonal;
    for (int c = j / V::kLanes * V::kLanes; c < strip.depth; c += V::kLanes)
      V::store(w + c, V::subtract_product(factor, V::load(upper + c), V::load(w + c)));
    w[j] = settled;  // exactly
  }
};

inline uint64_t bits_between(int begin, int end) {
  return (end == 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1) & ~uint64_t{0} << begin;
}

// Each settled weight waits for the one before it in its row, so kRows rows take turns.
template <class V, int kRows>
void sweep_some(const ObsStrip& strip, const ObsErrors& errors, int64_t first) {
  RowState<V> rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i].open(strip, errors, first + i);
  const int step = strip.n ? strip.m : strip.depth;
  for (int begin = 0; begin < strip.depth; begin += step) {
    const int end = std::min(begin + step, strip.depth);
    uint64_t gone[kRows], open[kRows];
    for (int i = 0; i < kRows; ++i) {
      uint8_t* keep = strip.keep + (first + i) * strip.keep_stride;
      if (!strip.n) {
        gone[i] = zeros_of(keep, strip.depth);
      } else {
        const bool whole = begin + step <= strip.depth;  // a short group at the end of a row stays
        gone[i] = whole ? choose_any(rows[i].w + begin, strip.scale + begin, strip.n, strip.m)
                              << begin
                        : 0;
        for (int c = begin; c < end; ++c) keep[c] = !(gone[i] >> c & 1);
      }
      open[i] = strip.grid.steps ? bits_between(begin, end) : gone[i];
    }
    while (kRows > 1 && std::all_of(open, open + kRows, [](uint64_t bits) { return bits != 0; }))
      for (int i = 0; i < kRows; ++i) rows[i].settle_first(strip, first + i, gone[i], open[i]);
    for (int i = 0; i < kRows; ++i)
      while (open[i]) rows[i].settle_first(strip, first + i, gone[i], open[i]);
  }
  for (int i = 0; i < kRows; ++i) rows[i].close(strip, errors, first + i);
}

template <class V>
void sweep_rows(const ObsStrip& strip, const ObsErrors& errors, int64_t begin, int64_t end) {
  constexpr int kRows = 2;
  int64_t r = begin;
  for (; r + kRows <= end; r += kRows) sweep_some<V, kRows>(strip, errors, r);
  for (; r < end; ++r) sweep_some<V, 1>(strip, errors, r);
}

}  // namespace
}  // namespace pysparse
