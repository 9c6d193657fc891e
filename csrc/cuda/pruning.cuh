#pragma once
// Selection by radix: a score's bits, in an order that unsigned numbers have, are found digit by
// digit from histograms in shared memory. The sweep: a warp has a row, each lane four columns of a
// strip in registers.
#include "entry.cuh"
#include "pruning.h"

namespace pysparse::cuda {

constexpr int kSelectThreads = 256,
              kJointThreads = 1024;  // of the block that has a row, or all rows
constexpr int kDigits = 256;
constexpr int kNmThreads = 256;
constexpr int kSweepWarps = 8;
constexpr int kPerLane = kObsStrip / kLanes;  // columns of a lane
constexpr int kLongest = 64;                  // group of n:m
constexpr int kTile = 64, kDepth = 16;  // of the update: rows and columns, and terms at a time
constexpr int kUpdateThreads = 256;     // four rows by four columns each

// Unsigned numbers in the order of the scores; both zeros are one.
__device__ __forceinline__ uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

template <class T>
__device__ __forceinline__ float score_at(const ScoredMatrix& m, int64_t place, int64_t col) {
  using Word = typename Numbers<T>::Word;
  const float weight = Numbers<T>::of(__ldg(static_cast<const Word*>(m.weight) + place));
  return m.scale ? fabsf(__fmul_rn(fabsf(weight), __ldg(m.scale + col))) : weight;
}

// Where the c-th weight of a thread block's competition lies, and its column.
struct Competitor {
  int64_t row, col;
};
template <bool kJoint>
__device__ __forceinline__ Competitor competitor(const ScoredMatrix& m, int64_t c) {
  if (kJoint) return {c / m.cols, c % m.cols};
  return {static_cast<int64_t>(blockIdx.x), c};
}

// A shared histogram's digit that holds the rank-th smallest (from 1); the first warp looks for it.
struct Found {
  uint32_t digit;
  int64_t rank;      // within the digit
  uint32_t members;  // of the digit
};
__device__ inline void find_digit(const uint32_t* histogram, int64_t rank, Found* found) {
  constexpr int kShare = kDigits / kLanes;
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= kLanes) return;
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) own += histogram[lane * kShare + i];
  uint32_t before = own;
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const uint32_t lower = __shfl_up_sync(kFullWarp, before, d);
    if (lane >= d) before += lower;
  }
  before -= own;
  if (rank <= before || rank > static_cast<int64_t>(before) + own) return;
  int64_t left = rank - before;
  for (int i = 0; i < kShare; ++i) {
    const uint32_t members = histogram[lane * kShare + i];
    if (left <= members) {
      *found = {static_cast<uint32_t>(lane * kShare + i), left, members};
      return;
    }
    left -= members;
  }
}

// The key of the count-th smallest, and how many of those equal to it go.
struct Threshold {
  uint32_t key;
  int64_t ties;
  bool all;  // every tie goes
};
template <class T, bool kJoint>
__device__ Threshold find_threshold(const ScoredMatrix& m, int64_t size, int64_t count) {
  __shared__ uint32_t histogram[kDigits];
  __shared__ Found found;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  uint32_t prefix = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = thread; i < kDigits; i += threads) histogram[i] = 0;
    __syncthreads();  // cleared, and the digit before has been read by all
    for (int64_t c = thread; c < size; c += threads) {
      const Competitor at = competitor<kJoint>(m, c);
      const uint32_t key = key_of(score_at<T>(m, at.row * m.stride + at.col, at.col));
      if ((key & known) == prefix) atomicAdd(histogram + (key >> shift & (kDigits - 1)), 1u);
    }
    __syncthreads();
    find_digit(histogram, count, &found);
    __syncthreads();
    prefix |= found.digit << shift;
    known |= static_cast<uint32_t>(kDigits - 1) << shift;
    count = found.rank;
  }
  return {prefix, count, count == found.members};
}

// How many threads before this one have the flag; `total` of the block. Two barriers.
__device__ inline int flags_before(bool flag, int& total) {
  __shared__ int counts[kJointThreads / kLanes];
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t flags = __ballot_sync(kFullWarp, flag);
  __syncthreads();  // the counts of the round before have been read
  if (lane == 0) counts[warp] = __popc(flags);
  __syncthreads();
  int before = __popc(flags & ((1u << lane) - 1u));
  total = 0;
  for (int w = 0; w < static_cast<int>(blockDim.x) / kLanes; ++w) {
    if (w < warp) before += counts[w];
    total += counts[w];
  }
  return before;
}

template <class T>
__device__ __forceinline__ void put(const ScoredMatrix& m, const Chosen& out, int64_t row,
                                    int64_t col, bool keep) {
  out.keep[row * out.stride + col] = keep;
  if (!out.pruned) return;
  const int64_t place = row * m.stride + col;
  static_cast<T*>(out.pruned)[place] =
      keep ? static_cast<const T*>(m.weight)[place] : narrow<T>(0.0f);
}

__device__ inline void report(Damage* damage, float score, const float* scale, int64_t row,
                              int64_t col) {
  if (isnan(score)) atomicAdd(&damage->nan, 1u);
  if (row == 0 && scale && __ldg(scale + col) < 0.0f) atomicAdd(&damage->negative, 1u);
}

template <class T, bool kJoint>
__global__ __launch_bounds__(kJoint ? kJointThreads : kSelectThreads) void select_rows_kernel(
    ScoredMatrix m, int64_t count, Chosen out, Damage* damage) {
  const int64_t size = kJoint ? m.rows * m.cols : m.cols;
  const bool any = count > 0;
  const Threshold last = any ? find_threshold<T, kJoint>(m, size, count) : Threshold{0, 0, true};
  int64_t ties_before = 0;
  for (int64_t first = 0; first < size; first += blockDim.x) {  // all threads, for the barriers
    const int64_t c = first + threadIdx.x;
    const bool inside = c < size;
    const Competitor at = competitor<kJoint>(m, inside ? c : 0);
    const float score = score_at<T>(m, at.row * m.stride + at.col, at.col);
    const uint32_t key = key_of(score);
    const bool tied = inside && any && key == last.key;
    bool gone = any && (key < last.key || (tied && last.all));
    if (!last.all) {
      int total;
      gone |= flags_before(tied, total) + ties_before < last.ties && tied;
      ties_before += total;
    }
    if (!inside) continue;
    report(damage, score, m.scale, at.row, at.col);
    put<T>(m, out, at.row, at.col, !gone);
  }
}

// m divides the warp: each lane has a weight and asks its neighbours for theirs.
template <class T>
__global__ __launch_bounds__(kNmThreads) void select_nm_kernel(ScoredMatrix m, int n, int group,
                                                               Chosen out, Damage* damage) {
  const int64_t warps = ceil_div(m.cols, kLanes);
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kNmThreads + threadIdx.x) / kLanes;
  if (warp >= m.rows * warps) return;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, place = lane % group;
  const int64_t row = warp / warps, col = warp % warps * kLanes + lane;
  const bool inside = col < m.cols;
  const float score = inside ? score_at<T>(m, row * m.stride + col, col) : 0.0f;
  const uint32_t key = key_of(score);
  int before = 0;
  for (int j = 0; j < group; ++j) {
    const uint32_t other = __shfl_sync(kFullWarp, key, lane - place + j);
    before += j < place ? other <= key : other < key;
  }
  if (!inside) return;
  report(damage, score, m.scale, row, col);
  put<T>(m, out, row, col, col - place + group > m.cols || before >= group - n);
}

// Any other m: a thread has a weight and reads its whole group.
template <class T>
__global__ __launch_bounds__(kNmThreads) void select_any_kernel(ScoredMatrix m, int n, int group,
                                                                Chosen out, Damage* damage) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kNmThreads + threadIdx.x;
  if (at >= m.rows * m.cols) return;
  const int64_t row = at / m.cols, col = at % m.cols, first = col / group * group;
  const float score = score_at<T>(m, row * m.stride + col, col);
  const uint32_t key = key_of(score);
  report(damage, score, m.scale, row, col);
  int before = 0;
  if (first + group <= m.cols)
    for (int64_t j = first; j < first + group; ++j) {
      const uint32_t other = key_of(score_at<T>(m, row * m.stride + j, j));
      before += j < col ? other <= key : other < key;
    }
  put<T>(m, out, row, col, first + group > m.cols || before >= group - n);
}

// Columns [first, first + depth) of the sweep; the errors of weights that stay are zero.
struct StripView {
  int64_t first;
  int depth;
};

// Which of a group's weights go, as bits from the group's first column on.
__device__ inline uint64_t choose(const ObsSweep& s, const float* scores) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  uint64_t gone = 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = lane + half * kLanes;
    int before = 0;
    const float own = i < s.m ? scores[i] : 0.0f;
    for (int j = 0; j < s.m; ++j) before += j < i ? scores[j] <= own : (j > i && scores[j] < own);
    const uint32_t some = __ballot_sync(kFullWarp, i < s.m && before < s.m - s.n);
    gone |= static_cast<uint64_t>(some) << half * kLanes;
  }
  return gone;
}

__global__ __launch_bounds__(kSweepWarps* kLanes) void sweep_kernel(ObsSweep s, StripView strip,
                                                                    float* errors) {
  __shared__ float scores[kSweepWarps][kLongest];
  const int warp = static_cast<int>(threadIdx.x) / kLanes, lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSweepWarps + warp;
  if (row >= s.rows) return;
  float* weight = s.weight + row * s.cols + strip.first;
  uint8_t* keep = s.keep + row * s.cols + strip.first;
  const float* upper = s.upper + strip.first * s.cols + strip.first;
  float w[kPerLane], inverse[kPerLane], error[kPerLane];
  uint32_t stays[kPerLane];
#pragma unroll
  for (int q = 0; q < kPerLane; ++q) {
    const int c = q * kLanes + lane;
    const bool inside = c < strip.depth;
    w[q] = inside ? weight[c] : 0.0f;
    inverse[q] = inside ? __fdiv_rn(1.0f, __ldg(upper + c * (s.cols + 1))) : 0.0f;
    error[q] = 0.0f;
    stays[q] = __ballot_sync(kFullWarp, s.n > 0 || !inside || keep[c] != 0);
  }
  int group = 0;  // first column of the group whose weights were chosen last
  uint64_t gone = 0;
#pragma unroll
  for (int q = 0; q < kPerLane; ++q) {
    for (int j = 0; j < kLanes && q * kLanes + j < strip.depth; ++j) {
      const int c = q * kLanes + j;
      if (s.n > 0 && c % s.m == 0) {
        group = c;
        gone = 0;
        if (c + s.m <= strip.depth) {  // a short group at the end of a row stays
#pragma unroll
          for (int p = 0; p < kPerLane; ++p) {
            const int mine = p * kLanes + lane;
            if (mine >= c && mine < c + s.m)
              scores[warp][mine - c] = __fmul_rn(fabsf(w[p]), __ldg(s.scale + strip.first + mine));
          }
          __syncwarp();
          gone = choose(s, scores[warp]);
          __syncwarp();  // read by all before the next group writes
        }
      }
      const bool pruned = s.n > 0 ? gone >> (c - group) & 1u : !(stays[q] >> j & 1u);
      if (!pruned) continue;                                                      // the whole warp
      const float lost = __shfl_sync(kFullWarp, __fmul_rn(w[q], inverse[q]), j);  // w_j / U_jj
      if (lane == j) w[q] = 0.0f, error[q] = lost;
      stays[q] &= ~(1u << j);
#pragma unroll
      for (int p = q; p < kPerLane; ++p) {
        const int mine = p * kLanes + lane;
        if (mine > c && mine < strip.depth)
          w[p] = __fmaf_rn(-lost, __ldg(upper + static_cast<int64_t>(c) * s.cols + mine), w[p]);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kPerLane; ++q) {
    const int c = q * kLanes + lane;
    errors[row * kObsStrip + c] = error[q];
    if (c >= strip.depth) continue;
    weight[c] = w[q];
    if (s.n > 0) keep[c] = stays[q] >> lane & 1u;
  }
}

// Columns right of the strip -= errors U. Terms are subtracted one after the other in the order of
// the columns, each rounded, so the bits are those of a weight that waits for its turn on the CPU.
__global__ __launch_bounds__(kUpdateThreads) void update_kernel(ObsSweep s, StripView strip,
                                                                const float* errors) {
  __shared__ float e[kDepth][kTile + 1], u[kDepth][kTile];
  const int thread = static_cast<int>(threadIdx.x), tx = thread % 16, ty = thread / 16;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_col = strip.first + strip.depth + static_cast<int64_t>(blockIdx.x) * kTile;
  float sum[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first_row + ty + 16 * i, col = first_col + tx + 16 * j;
      sum[i][j] = row < s.rows && col < s.cols ? s.weight[row * s.cols + col] : 0.0f;
    }
  for (int k = 0; k < strip.depth; k += kDepth) {
    for (int i = thread; i < kDepth * kTile; i += kUpdateThreads) {
      const int64_t row = first_row + i / kDepth, col = first_col + i % kTile;
      const int along = k + i % kDepth, down = k + i / kTile;
      e[i % kDepth][i / kDepth] =
          row < s.rows && along < strip.depth ? __ldg(errors + row * kObsStrip + along) : 0.0f;
      u[i / kTile][i % kTile] = col < s.cols && down < strip.depth
                                    ? __ldg(s.upper + (strip.first + down) * s.cols + col)
                                    : 0.0f;
    }
    __syncthreads();
#pragma unroll 4
    for (int d = 0; d < kDepth; ++d)
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          sum[i][j] = __fmaf_rn(-e[d][ty + 16 * i], u[d][tx + 16 * j], sum[i][j]);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t row = first_row + ty + 16 * i, col = first_col + tx + 16 * j;
      if (row < s.rows && col < s.cols) s.weight[row * s.cols + col] = sum[i][j];
    }
}

}  // namespace pysparse::cuda
