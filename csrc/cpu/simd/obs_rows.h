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
    const float* values = errors.values + r * errors.depth;
    const uint8_t* columns = errors.columns + r * errors.depth;
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

// Marks the n largest of m scores; of equal ones the lower column goes first.
inline void choose(const float* w, const float* scale, int n, int m, uint8_t* keep) {
  float scores[kObsDiagonal];
  for (int i = 0; i < m; ++i) scores[i] = __builtin_fabsf(w[i]) * scale[i];
  for (int i = 0; i < m; ++i) {
    int before = 0;
    for (int j = 0; j < i; ++j) before += scores[j] <= scores[i];
    for (int j = i + 1; j < m; ++j) before += scores[j] < scores[i];
    keep[i] = before >= m - n;
  }
}

template <class V>
void sweep_rows(const ObsStrip& strip, const ObsErrors& errors, int64_t begin, int64_t end) {
  alignas(64) float w[kObsDiagonal] = {};
  for (int64_t r = begin; r < end; ++r) {
    float* row = strip.panel + r * strip.stride;
    uint8_t* keep = strip.keep + r * strip.keep_stride;
    float* values = errors.values + r * errors.depth;
    uint8_t* columns = errors.columns + r * errors.depth;
    int count = 0;
    std::copy(row, row + strip.depth, w);
    for (int j = 0; j < strip.depth; ++j) {
      if (strip.n && j % strip.m == 0) {
        if (j + strip.m <= strip.depth)
          choose(w + j, strip.scale + j, strip.n, strip.m, keep + j);
        else  // a short group at the end of a row stays
          std::fill(keep + j, keep + strip.depth, uint8_t{1});
      }
      if (keep[j]) continue;
      const float error = w[j] * strip.inverse[j];
      values[count] = error;
      columns[count++] = static_cast<uint8_t>(j);
      const auto factor = V::broadcast(error);
      const float* upper = strip.upper + j * kObsDiagonal;
      for (int c = j / V::kLanes * V::kLanes; c < strip.depth; c += V::kLanes)
        V::store(w + c, V::subtract_product(factor, V::load(upper + c), V::load(w + c)));
      w[j] = 0.0f;  // exactly
    }
    errors.counts[r] = static_cast<uint8_t>(count);
    std::copy(w, w + strip.depth, row);
  }
}

}  // namespace
}  // namespace pysparse
