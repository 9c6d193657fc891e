#pragma once
// A warp walks one sample of a factorisation machine. Its arithmetic is that of the CPU's AVX-512
// kernel (csrc/cpu/shapley_fm_avx512.cpp), operation for operation and rounded alike, so that both
// find the same bits: sixteen lanes of a warp stand for the sixteen of a register.
#include "common.cuh"
#include "pysparse/rng.h"
#include "pysparse/shapley_units.h"
#include "shapley.h"

namespace pysparse::cuda {

constexpr int kDrawThreads = 128;
constexpr int kWalkWarps = 4;  // of a thread block, where its shared memory has room for so many
constexpr int kRegister = 16;  // lanes

__device__ inline Stream stream_for(const ShapleyDraw& draw, int64_t row) {
  return {draw.seed, draw.first + static_cast<uint64_t>(row), draw.visit, draw.purpose};
}

// A thread draws four words of a row.
__global__ __launch_bounds__(kDrawThreads) void words_kernel(ShapleyDraw draw, bool partners,
                                                             uint32_t* words) {
  const int64_t blocks = ceil_div(draw.cols, 4);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (at >= draw.rows * blocks) return;
  const int64_t row = at / blocks;
  const auto block = static_cast<uint32_t>(at % blocks), cols = static_cast<uint32_t>(draw.cols);
  const Stream stream = stream_for(draw, row);
  uint32_t x[4] = {stream.low(), stream.high(), stream.purpose, block};
  philox(stream.key, x);
#pragma unroll
  for (uint32_t r = 0; r < 4; ++r) {
    const uint32_t i = 4 * block + r;
    if (i < cols)
      words[row * draw.cols + i] = partners ? i + uniform_below(stream, x[r], i, cols - i) : x[r];
  }
}

// Fisher-Yates by one thread a row: partner[i] >= i is swapped with i, i ascending. What it reads
// of `order` beyond i is untouched, unless a swap has been there.
__global__ __launch_bounds__(kDrawThreads) void swap_kernel(int64_t rows, int64_t cols,
                                                            const uint32_t* partners,
                                                            int32_t* orders) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (row >= rows) return;
  const uint32_t* partner = partners + row * cols;
  int32_t* order = orders + row * cols;
  for (int64_t i = 0; i < cols; ++i) order[i] = static_cast<int32_t>(i);
  for (int64_t i = 0; i < cols; ++i) {
    const uint32_t j = __ldg(partner + i);
    const int32_t mine = order[i];
    order[i] = order[j];
    order[j] = mine;
  }
}

// What a warp keeps in shared memory; players are padded as on the CPU.
struct Walk {
  float* delta;    // [padded] c - E, and in the end the marginals
  float* bias;     // [padded] -(c - E) E
  float* forward;  // [players] steps of the logit, then of the loss; before that, the partners
  float* backward;
  float *sum, *both;       // [cols] of E; of E and c
  uint16_t *left, *order;  // [players] not yet removed; in order of removal
};

PYSPARSE_EVERYWHERE inline int64_t walk_bytes(int fields, int cols) {
  const int64_t players = static_cast<int64_t>(fields) * cols;
  const int64_t padded = static_cast<int64_t>(fields) * padded_width(cols);
  return ceil_div(8 * padded + 8 * players + 8 * static_cast<int64_t>(cols) + 4 * players, 16) * 16;
}

__device__ inline Walk lay_out(char* room, int players, int padded, int cols) {
  Walk w;
  w.delta = reinterpret_cast<float*>(room);
  w.bias = w.delta + padded;
  w.forward = w.bias + padded;
  w.backward = w.forward + players;
  w.sum = w.backward + players;
  w.both = w.sum + cols;
  w.left = reinterpret_cast<uint16_t*>(w.both + cols);
  w.order = w.left + players;
  return w;
}

// The sum of sixteen lanes, as _mm512_reduce_add_ps adds them.
__device__ __forceinline__ float register_sum(float value) {
#pragma unroll
  for (int d = kRegister / 2; d; d /= 2)
    value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, d));
  return value;
}

// Reads the rows of a sample; returns its logit. Each half of the warp has sixteen columns at once.
__device__ inline float read_sample(const FmSamples& v, int64_t sample, int width, const Walk& w) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int32_t* ids = v.ids + sample * v.fields;
  float pairs = 0.0f;
  for (int first = 0; first < v.cols; first += kLanes) {
    const int k = first + lane;
    float sum = 0.0f, both = 0.0f, squares = 0.0f;
    if (k < v.cols) {
      for (int f = 0; f < v.fields; ++f) {
        const float e = __ldg(v.table + static_cast<int64_t>(__ldg(ids + f)) * v.cols + k);
        const float c = __ldg(v.base + f * v.cols + k);
        const float delta = __fsub_rn(c, e);
        w.delta[f * width + k] = delta;
        w.bias[f * width + k] = __fmul_rn(delta, __fsub_rn(0.0f, e));
        sum = __fadd_rn(sum, e);
        both = __fadd_rn(both, __fadd_rn(e, c));
        squares = __fmaf_rn(e, e, squares);
      }
      w.sum[k] = sum;
      w.both[k] = both;
    }
    const float part = register_sum(__fmaf_rn(sum, sum, -squares));
    pairs = __fadd_rn(pairs, __shfl_sync(kFullWarp, part, 0));
    if (first + kRegister < v.cols)
      pairs = __fadd_rn(pairs, __shfl_sync(kFullWarp, part, kRegister));
  }
  return __fmaf_rn(0.5f, pairs, v.offset ? __ldg(v.offset + sample) : 0.0f);
}

// Draws the partners, or takes a given order, in which nothing is swapped.
__device__ inline void prepare_order(const FmOrders& orders, int64_t sample, int players, int cols,
                                     int width, const Walk& w) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  auto* partner = reinterpret_cast<uint32_t*>(w.forward);
  for (int i = lane; i < players; i += kLanes) {
    const int player = orders.orders ? __ldg(orders.orders + sample * players + i) : i;
    w.left[i] = static_cast<uint16_t>(player / cols * width + player % cols);
    if (orders.orders) partner[i] = static_cast<uint32_t>(i);
  }
  if (orders.orders) return;
  const Stream stream{orders.seed, orders.first + static_cast<uint64_t>(sample), orders.visit, 0};
  for (int block = lane; 4 * block < players; block += kLanes) {
    uint32_t x[4] = {stream.low(), stream.high(), 0, static_cast<uint32_t>(block)};
    philox(stream.key, x);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const auto i = static_cast<uint32_t>(4 * block + r), all = static_cast<uint32_t>(players);
      if (i < all) partner[i] = i + uniform_below(stream, x[r], i, all - i);
    }
  }
}

// The swaps depend on each other, so one lane makes them, and the others wait.
__device__ inline void shuffle_order(int players, const Walk& w) {
  const auto* partner = reinterpret_cast<const uint32_t*>(w.forward);
  if (threadIdx.x % kLanes) return;
  for (int i = 0; i < players; ++i) {
    const uint32_t j = partner[i];
    w.order[i] = w.left[j];
    w.left[j] = w.left[i];
  }
}

// Removals of one column depend on each other, those of different columns do not: a lane each.
__device__ inline void remove_all(int players, int cols, int width, bool antithetic,
                                  const Walk& w) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int k = lane; k < cols; k += kLanes) {
    float sum = w.sum[k];
    const float both = w.both[k];
    for (int i = 0; i < players; ++i) {
      const int p = w.order[i];
      if ((p & (width - 1)) != k) continue;
      const float delta = w.delta[p], bias = w.bias[p];
      w.forward[i] = __fmaf_rn(delta, sum, bias);
      sum = __fadd_rn(sum, delta);
      if (antithetic) w.backward[players - 1 - i] = __fmaf_rn(delta, __fsub_rn(both, sum), bias);
    }
  }
}

// log(1 + e^-a) = q z, a >= 0, by the series of csrc/cpu/simd/losses_avx512.h; returns z.
__device__ inline float log1p_exp_parts(float minus_a, float& q) {
  const float x = fmaxf(minus_a, -87.0f);
  const float n = rintf(__fmul_rn(x, 1.44269504f));
  float r = __fmaf_rn(n, -0.693359375f, x);
  r = __fmaf_rn(n, 2.12194440e-4f, r);
  float p = 1.0f / 720;
  p = __fmaf_rn(p, r, 1.0f / 120), p = __fmaf_rn(p, r, 1.0f / 24), p = __fmaf_rn(p, r, 1.0f / 6);
  p = __fmaf_rn(p, r, 0.5f), p = __fmaf_rn(p, r, 1.0f), p = __fmaf_rn(p, r, 1.0f);
  const float power = __uint_as_float(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
  const float e = __fmul_rn(p, power);  // n >= -126: a normal number
  const float z = __fdiv_rn(e, __fadd_rn(e, 2.0f)), z2 = __fmul_rn(z, z);
  q = 2.0f / 13;
  q = __fmaf_rn(q, z2, 2.0f / 11), q = __fmaf_rn(q, z2, 2.0f / 9), q = __fmaf_rn(q, z2, 2.0f / 7);
  q = __fmaf_rn(q, z2, 2.0f / 5), q = __fmaf_rn(q, z2, 2.0f / 3), q = __fmaf_rn(q, z2, 2.0f);
  return z;
}

__device__ inline float log_loss(float logit, float label) {
  float q;
  const float z = log1p_exp_parts(-fabsf(logit), q);
  const float straight = __fmaf_rn(-label, logit, fmaxf(logit, 0.0f));
  return __fmaf_rn(q, z, straight);
}

// In place: steps of the logit become steps of the loss, sixteen at a time in each half of the
// warp. The halves have an order each, or the same one.
__device__ inline void loss_steps(float* steps, int count, float logit, float label) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, place = lane % kRegister;
  const int last = lane - place + kRegister - 1;
  float t = logit, before = log_loss(t, label);
  for (int first = 0; first < count; first += kRegister) {
    const int i = first + place;
    const float step = i < count ? steps[i] : 0.0f;
    float sum = step;
#pragma unroll
    for (int d = 1; d < kRegister; d *= 2) {
      const float lower = __shfl_up_sync(kFullWarp, sum, d);
      sum = __fadd_rn(sum, place >= d ? lower : 0.0f);
    }
    const float now = __fadd_rn(sum, t), loss = log_loss(now, label);
    const float lower = __shfl_up_sync(kFullWarp, loss, 1), previous = place ? lower : before;
    // A step of zero must cost exactly nothing, but the sums around it round differently.
    if (i < count) steps[i] = step != 0.0f ? __fsub_rn(loss, previous) : 0.0f;
    t = __shfl_sync(kFullWarp, now, last);
    before = __shfl_sync(kFullWarp, loss, last);
  }
}

// Marginals by player, through shared memory, so that whole lines are written.
__device__ inline void write_marginals(int players, int cols, int width, bool antithetic,
                                       const Walk& w, float* marginals, uint32_t* peak) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  uint32_t largest = 0;
  for (int i = lane; i < players; i += kLanes) {
    const float value = antithetic
                            ? __fmul_rn(0.5f, __fadd_rn(w.forward[i], w.backward[players - 1 - i]))
                            : w.forward[i];
    w.delta[w.order[i]] = value;
    largest = max(largest, __float_as_uint(value) & 0x7fffffffu);
  }
  __syncwarp();
  for (int i = lane; i < players; i += kLanes) marginals[i] = w.delta[i / cols * width + i % cols];
#pragma unroll
  for (int d = kLanes / 2; d; d /= 2)
    largest = max(largest, __shfl_xor_sync(kFullWarp, largest, d));
  if (lane == 0) atomicMax(peak, largest);
}

extern __shared__ __align__(16) char walk_room[];

// Four blocks a multiprocessor are what shared memory has room for at 624 players; told nothing,
// the compiler aims higher on sm_80 and spills.
__global__ __launch_bounds__(kWalkWarps* kLanes,
                             4) void fm_walk_kernel(FmSamples v, FmOrders orders, float* marginals,
                                                    uint32_t* peak) {
  const int warp = static_cast<int>(threadIdx.x) / kLanes;
  const int64_t sample = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + warp;
  if (sample >= v.samples) return;
  const int players = v.fields * v.cols, width = padded_width(v.cols);
  const Walk w =
      lay_out(walk_room + warp * walk_bytes(v.fields, v.cols), players, v.fields * width, v.cols);
  const float logit = read_sample(v, sample, width, w), label = __ldg(v.labels + sample);
  prepare_order(orders, sample, players, v.cols, width, w);
  __syncwarp();
  shuffle_order(players, w);
  __syncwarp();
  remove_all(players, v.cols, width, orders.antithetic, w);
  __syncwarp();
  // Without a second order the upper half repeats the lower one's work, on what it does not touch.
  const bool upper = threadIdx.x % kLanes >= kRegister;
  if (!orders.antithetic)
    for (int i = threadIdx.x % kLanes; i < players; i += kLanes) w.backward[i] = w.forward[i];
  __syncwarp();
  loss_steps(upper ? w.backward : w.forward, players, logit, label);
  __syncwarp();
  write_marginals(players, v.cols, width, orders.antithetic, w, marginals + sample * players, peak);
}

// A thread has one marginal. Whole numbers: the order in which they are added changes no bit.
__global__ __launch_bounds__(kDrawThreads) void add_kernel(const float* marginals,
                                                           const int32_t* ids, int64_t count,
                                                           int cols, MarginalSums totals) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (at >= count) return;
  const double x = __ldg(marginals + at);
  if (x == 0.0) return;
  const int64_t entry = static_cast<int64_t>(__ldg(ids + at / cols)) * cols + at % cols;
  const long long sum = __double2ll_rn(x * kSumScale),
                  square = __double2ll_rn(x * x * kSquareScale);
  atomicAdd(reinterpret_cast<unsigned long long*>(totals.sums + entry),
            static_cast<unsigned long long>(sum));
  atomicAdd(reinterpret_cast<unsigned long long*>(totals.squares + entry),
            static_cast<unsigned long long>(square));
}

}  // namespace pysparse::cuda
