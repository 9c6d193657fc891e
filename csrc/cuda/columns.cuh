#pragma once
// What kernels share that walk rows of stored weights on the ordinary cores: x in shared memory as
// one word per column that holds all tokens, lane sums, rows written out densely.
#include "launch.cuh"

namespace pysparse::cuda {

// What a multiprocessor's 65536 registers hold: 1024 threads at 64; eight sums per lane need more
// of them.
constexpr int most_threads(int tokens) { return tokens <= 4 ? 1024 : 512; }

// What shared memory holds per column: the float itself for one token, else all tokens' 16-bit
// values.
template <int kTokens>
struct Column;
template <>
struct Column<1> {
  using Word = float;
};
template <>
struct Column<2> {
  using Word = uint32_t;
};
template <>
struct Column<4> {
  using Word = uint2;
};
template <>
struct Column<8> {
  using Word = uint4;
};

template <class T>
__device__ __forceinline__ void add(float (&sums)[1], float weight, float x) {
  sums[0] = fmaf(weight, x, sums[0]);
}
template <class T>
__device__ __forceinline__ void add2(float* sums, float weight, uint32_t x) {
  sums[0] = fmaf(weight, low_value<T>(x), sums[0]);
  sums[1] = fmaf(weight, high_value<T>(x), sums[1]);
}
template <class T>
__device__ __forceinline__ void add(float (&sums)[2], float weight, uint32_t x) {
  add2<T>(sums, weight, x);
}
template <class T>
__device__ __forceinline__ void add(float (&sums)[4], float weight, uint2 x) {
  add2<T>(sums, weight, x.x);
  add2<T>(sums + 2, weight, x.y);
}
template <class T>
__device__ __forceinline__ void add(float (&sums)[8], float weight, uint4 x) {
  add2<T>(sums, weight, x.x);
  add2<T>(sums + 2, weight, x.y);
  add2<T>(sums + 4, weight, x.z);
  add2<T>(sums + 6, weight, x.w);
}

// Stores 8 columns from `column` on; words: 8 values of each token.
template <class T, int kTokens>
__device__ __forceinline__ void store_columns(typename Column<kTokens>::Word* column,
                                              const uint4 (&tokens)[kTokens]) {
  uint32_t out[8 * sizeof(*column) / 4];
#pragma unroll
  for (int t = 0; t < kTokens; t += 2) {
    const uint4 low = tokens[t], high = tokens[kTokens == 1 ? t : t + 1];
    const uint32_t a[4] = {low.x, low.y, low.z, low.w}, b[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if constexpr (kTokens == 1)
        out[c] = __float_as_uint(c % 2 ? high_value<T>(a[c / 2]) : low_value<T>(a[c / 2]));
      else
        out[c * kTokens / 2 + t / 2] = __byte_perm(a[c / 2], b[c / 2], c % 2 ? 0x7632 : 0x5410);
  }
#pragma unroll
  for (unsigned i = 0; i < sizeof(out) / 16; ++i)
    reinterpret_cast<uint4*>(column)[i] =
        make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
}

// The 8 inputs of a token from column `col` on, zeros past its end.
__device__ __forceinline__ uint4 load_inputs(const Product& p, int token, int col) {
  if (token >= p.tokens || col >= p.cols) return uint4{};
  const auto* x = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(token) * p.cols + col;
  if (p.cols % 8 == 0) return *reinterpret_cast<const uint4*>(x);
  uint32_t words[4] = {};
#pragma unroll
  for (int h = 0; h < 8; ++h)
    if (col + h < p.cols) words[h / 2] |= static_cast<uint32_t>(x[h]) << 16 * (h % 2);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Fills columns [0, count), `count` a multiple of 8, and returns (to all threads) the bit set of
// tokens that hold Inf or NaN.
template <class T, int kTokens>
__device__ __forceinline__ unsigned stage(const Product& p, int count,
                                          typename Column<kTokens>::Word* columns) {
  __shared__ unsigned poisoned;
  if (threadIdx.x == 0) poisoned = 0;
  __syncthreads();  // the flag is zero before anyone sets it
  for (int c = 8 * static_cast<int>(threadIdx.x); c < count;
       c += 8 * static_cast<int>(blockDim.x)) {
    uint4 tokens[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) tokens[t] = load_inputs(p, t, c);
    store_columns<T, kTokens>(columns + c, tokens);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
      if (any_not_finite<T>(tokens[t].x) || any_not_finite<T>(tokens[t].y) ||
          any_not_finite<T>(tokens[t].z) || any_not_finite<T>(tokens[t].w))
        atomicOr(&poisoned, 1u << t);
  }
  __syncthreads();  // columns and flag are complete
  return poisoned;
}

__device__ __forceinline__ float lanes_sum(float value, int width) {
#pragma unroll
  for (int d = kLanes / 2; d; d /= 2)
    if (d < width) value += __shfl_xor_sync(kFullWarp, value, d);
  return value;
}

// Lane sums to the result of a row that `width` neighbouring lanes share (a power of two); with
// several warps per row, through shared memory in a fixed order.
template <class T, int kTokens>
__device__ __forceinline__ void finish(const Product& p, int row, int width, int team,
                                       float (&sums)[kTokens], float* partial, unsigned poisoned) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % width;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = lanes_sum(sums[t], width);
  if (team > 1) {
    if (lane == 0)
      for (int t = 0; t < kTokens; ++t) partial[warp * kTokens + t] = sums[t];
    __syncthreads();  // all partial sums are there
    if (warp % team == 0)
      for (int t = 0; t < kTokens; ++t) {
        sums[t] = 0.f;
        for (int w = warp; w < warp + team; ++w) sums[t] += partial[w * kTokens + t];
      }
    __syncthreads();  // and read, before the next row overwrites them
  }
  if (lane != 0 || warp % team != 0 || row >= p.rows) return;
  const float bias = p.bias ? widen(static_cast<const T*>(p.bias)[row]) : 0.f;
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    if (t < p.tokens) {
      const float poison =
          poisoned >> t & 1u ? __uint_as_float(0x7fc00000u) : 0.f;  // a dense product meets 0 * Inf
      static_cast<T*>(p.y)[static_cast<int64_t>(t) * p.rows + row] =
          narrow<T>(sums[t] + bias + poison);
    }
}

constexpr int kUnpackThreads = 128;
constexpr int kUnpackColumns = 24 << 10;  // of a row that are in shared memory at a time: 48 KB

// Writes a row out densely, window after window: `scatter(staged, first, size)` puts the weights of
// columns [first, first + size) into shared memory, whole vectors leave.
template <class Scatter>
__device__ __forceinline__ void write_row(const Rows& r, uint4* shared, const Scatter& scatter) {
  auto* staged = reinterpret_cast<uint16_t*>(shared);
  for (int first = 0; first < r.cols; first += kUnpackColumns) {
    const int size = min(kUnpackColumns, r.cols - first);
    for (int v = threadIdx.x; v < (size + 7) / 8; v += kUnpackThreads) shared[v] = uint4{};
    __syncthreads();  // zeros are there before any weight
    scatter(staged, first, size);
    __syncthreads();  // the columns are complete
    auto* dense =
        static_cast<uint16_t*>(r.dense) + static_cast<int64_t>(blockIdx.x) * r.cols + first;
    const int vectors = r.cols % 8 == 0 ? size / 8 : 0;
    for (int v = threadIdx.x; v < vectors; v += kUnpackThreads)
      reinterpret_cast<uint4*>(dense)[v] = shared[v];
    for (int c = 8 * vectors + threadIdx.x; c < size; c += kUnpackThreads) dense[c] = staged[c];
    __syncthreads();  // and written, before they are zeroed again
  }
}
inline int unpack_shared(int cols) {
  return static_cast<int>(ceil_div(cols < kUnpackColumns ? cols : kUnpackColumns, 8)) * 16;
}

// Warps per row: enough rows in flight to fill the card, but no warp without a chunk.
inline int team_size(const Product& p, int warps, int most) {
  int team = 1;
  while (team * 2 <= most && p.rows * team * 2 <= warps && p.cols > 512 * team) team *= 2;
  return team;
}

// How a launch uses the card.
struct RowPlan {
  int threads, grid, team, shared;
};

// Plans a product with `count` columns of x in shared memory; `most_team` warps may share a row.
template <int kTokens>
cudaError_t plan_rows(const Product& p, const Device& card, int count, int most_team,
                      RowPlan& plan) {
  const auto shared_for = [&](int threads) {
    return count * static_cast<int>(sizeof(typename Column<kTokens>::Word)) +
           threads / kLanes * kTokens * static_cast<int>(sizeof(float));
  };
  // Two thread blocks overlap at the ends of a kernel, which pays until staging x twice costs more.
  constexpr int kMost = most_threads(kTokens), kCheap = 48 << 10;
  const int blocks = shared_for(kMost / 2) <= min(kCheap, card.shared_total / 2 - 1024) ? 2 : 1;
  plan.threads = kMost / blocks, plan.shared = shared_for(plan.threads);
  if (plan.shared > card.shared_block - 1024)
    return cudaErrorInvalidValue;  // there are static words, too
  plan.team =
      team_size(p, card.multiprocessors * (kMost / kLanes), min(most_team, plan.threads / kLanes));
  plan.grid = min(card.multiprocessors * blocks, p.rows);
  return cudaSuccess;
}

}  // namespace pysparse::cuda
