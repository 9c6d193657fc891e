// y = x W^T for rows of 4-bit column steps: some 7 instructions per stored weight whatever the density, x in
// shared memory as one word per column that holds all tokens, one or more warps per row.
#include "common.cuh"

namespace pysparse::cuda {
namespace {

// 1024 threads at 64 registers fill a multiprocessor that holds 2048; eight sums per lane need more registers.
constexpr int most_threads(int tokens) { return tokens <= 4 ? 1024 : 512; }

// What shared memory holds per column: the float itself for one token, else all tokens' 16-bit values.
template <int kTokens>
struct Column;
template <>
struct Column<1> { using Word = float; };
template <>
struct Column<2> { using Word = uint32_t; };
template <>
struct Column<4> { using Word = uint2; };
template <>
struct Column<8> { using Word = uint4; };

template <class T>
__device__ __forceinline__ void add(float (&sums)[1], float weight, float x) { sums[0] = fmaf(weight, x, sums[0]); }
template <class T>
__device__ __forceinline__ void add2(float* sums, float weight, uint32_t x) {
  sums[0] = fmaf(weight, low_value<T>(x), sums[0]);
  sums[1] = fmaf(weight, high_value<T>(x), sums[1]);
}
template <class T>
__device__ __forceinline__ void add(float (&sums)[2], float weight, uint32_t x) { add2<T>(sums, weight, x); }
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

// Fills columns [0, cols + slack) and returns (to all threads) the bit set of tokens that hold Inf or NaN.
template <class T, int kTokens>
__device__ unsigned stage(const Product& p, typename Column<kTokens>::Word* columns) {
  __shared__ unsigned poisoned;
  if (threadIdx.x == 0) poisoned = 0;
  __syncthreads();  // the flag is zero before anyone sets it
  const auto* x = static_cast<const uint16_t*>(p.x);
  unsigned mine = 0;
  for (int c = threadIdx.x; c < p.cols + kColumnSlack; c += blockDim.x) {
    uint32_t halves[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      halves[t] = c < p.cols && t < p.tokens ? x[static_cast<int64_t>(t) * p.cols + c] : 0u;
      mine |= static_cast<unsigned>(is_not_finite<T>(halves[t])) << t;
    }
    if constexpr (kTokens == 1) {
      columns[c] = low_value<T>(halves[0]);
    } else {
      auto* words = reinterpret_cast<uint32_t*>(columns + c);
#pragma unroll
      for (int t = 0; t < kTokens; t += 2) words[t / 2] = halves[t] | halves[t + 1] << 16;
    }
  }
  if (mine) atomicOr(&poisoned, mine);
  __syncthreads();  // columns and flag are complete
  return poisoned;
}

// One lane's share of a chunk: group `lane` and group `lane + 32`.
struct Share {
  uint4 values[2];
  uint32_t deltas[2];
  int column, groups;  // start of the chunk, and its groups
};

__device__ __forceinline__ Share fetch(const DeltaWeight& w, int row, int begin, int end, int chunk, int lane) {
  Share share{};
  share.groups = min(kChunkGroups, end - begin - chunk * kChunkGroups);
  const int64_t first = begin + static_cast<int64_t>(chunk) * kChunkGroups + lane;
  if (share.groups <= 0) return share;
  share.column = __ldg(w.chunk_cols + chunk_slot(row, begin, chunk));
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (lane + kLanes * h < share.groups) {
      share.values[h] = __ldcs(static_cast<const uint4*>(w.values) + first + kLanes * h);
      share.deltas[h] = __ldcs(w.deltas + first + kLanes * h);
    }
  return share;
}

// Columns that the 8 steps of a group span.
__device__ __forceinline__ uint32_t span(uint32_t deltas) {
  const uint32_t pairs = (deltas & 0x0f0f0f0fu) + (deltas >> 4 & 0x0f0f0f0fu);
  return (pairs * 0x01010101u >> 24) + kGroupEntries;
}

// Column before the first entry of each of the lane's two groups: one scan for both, in halves of a word
// (32 groups span at most 32 * 128 columns, which 16 bits hold).
__device__ __forceinline__ int2 starts(const Share& share, int lane) {
  const uint32_t own = span(share.deltas[0]) | span(share.deltas[1]) << 16;
  uint32_t sum = own;
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const uint32_t before = __shfl_up_sync(kFullWarp, sum, d);
    if (lane >= d) sum += before;
  }
  const uint32_t first_half = __shfl_sync(kFullWarp, sum, kLanes - 1) & 0xffffu;
  sum -= own;
  return {share.column + static_cast<int>(sum & 0xffffu),
          share.column + static_cast<int>(first_half + (sum >> 16))};
}

template <class T, int kTokens>
__device__ __forceinline__ void walk(uint4 values, uint32_t deltas, const typename Column<kTokens>::Word* before,
                                     float (&sums)[kTokens]) {
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    before += (deltas >> 8 * i & 15u) + 1;
    add<T>(sums, low_value<T>(words[i]), *before);
    before += (deltas >> (8 * i + 4) & 15u) + 1;
    add<T>(sums, high_value<T>(words[i]), *before);
  }
}

// Lane sums to the row's result; with several warps per row, through shared memory in a fixed order.
template <class T, int kTokens>
__device__ __forceinline__ void finish(const Product& p, int row, int team, float (&sums)[kTokens], float* partial,
                                       unsigned poisoned) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) sums[t] = warp_sum(sums[t]);
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
      const float poison = poisoned >> t & 1u ? __uint_as_float(0x7fc00000u) : 0.f;  // a dense product meets 0 * Inf
      static_cast<T*>(p.y)[static_cast<int64_t>(t) * p.rows + row] = narrow<T>(sums[t] + bias + poison);
    }
}

template <class T, int kTokens>
__global__ __launch_bounds__(most_threads(kTokens)) void delta_linear_kernel(DeltaWeight w, Product p, int team) {
  extern __shared__ uint4 shared[];
  auto* columns = reinterpret_cast<typename Column<kTokens>::Word*>(shared);
  auto* partial = reinterpret_cast<float*>(columns + (p.cols + kColumnSlack + 7) / 8 * 8);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int step = gridDim.x * (blockDim.x / kLanes / team);
  const int member = warp % team;
  // Neighbouring rows go to different multiprocessors: all of them get the same number to within one.
  int row = blockIdx.x + gridDim.x * (warp / team);
  int begin = row < p.rows ? __ldg(w.row_groups + row) : 0;
  int end = row < p.rows ? __ldg(w.row_groups + row + 1) : 0;
  Share share = fetch(w, row, begin, end, member, lane);  // on its way while x is staged
  const unsigned poisoned = stage<T, kTokens>(p, columns);
  for (int base = 0; base < p.rows; base += step) {
    const int next_row = row + step;
    const int next_begin = next_row < p.rows ? __ldg(w.row_groups + next_row) : 0;
    const int next_end = next_row < p.rows ? __ldg(w.row_groups + next_row + 1) : 0;
    float sums[kTokens] = {};
    for (int chunk = member; share.groups > 0; chunk += team) {
      const int2 before = starts(share, lane);
      const Share now = share;
      const bool last = end - begin <= (chunk + team) * kChunkGroups;
      share = last ? fetch(w, next_row, next_begin, next_end, member, lane)
                   : fetch(w, row, begin, end, chunk + team, lane);
      if (lane < now.groups) walk<T, kTokens>(now.values[0], now.deltas[0], columns + before.x, sums);
      if (lane + kLanes < now.groups) walk<T, kTokens>(now.values[1], now.deltas[1], columns + before.y, sums);
      if (last) break;
    }
    if (share.groups <= 0) share = fetch(w, next_row, next_begin, next_end, member, lane);
    finish<T, kTokens>(p, row, team, sums, partial, poisoned);
    row = next_row, begin = next_begin, end = next_end;
  }
}

// Writes rows out densely: zeros first, then each weight at its column.
template <class T>
__global__ __launch_bounds__(256) void delta_unpack_kernel(DeltaWeight w, Rows r) {
  const int lane = threadIdx.x % kLanes;
  const int local = blockIdx.x * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (local >= r.rows) return;  // the whole warp leaves together
  const int row = r.first_row + local;
  auto* dense = static_cast<uint16_t*>(r.dense) + static_cast<int64_t>(local) * r.cols;
  const int vectors = r.cols % 8 == 0 ? r.cols / 8 : 0;
  for (int c = lane; c < vectors; c += kLanes) reinterpret_cast<uint4*>(dense)[c] = uint4{};
  for (int c = 8 * vectors + lane; c < r.cols; c += kLanes) dense[c] = 0;
  __syncwarp();  // zeros are written before any lane's weights
  const int begin = w.row_groups[row], end = w.row_groups[row + 1];
  for (int chunk = 0; chunk * kChunkGroups < end - begin; ++chunk) {
    const Share share = fetch(w, row, begin, end, chunk, lane);
    const int2 before = starts(share, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (lane + kLanes * h >= share.groups) continue;
      const uint32_t words[4] = {share.values[h].x, share.values[h].y, share.values[h].z, share.values[h].w};
      int column = h ? before.y : before.x;
#pragma unroll
      for (int i = 0; i < kGroupEntries; ++i) {
        column += static_cast<int>(share.deltas[h] >> 4 * i & 15u) + 1;
        const auto value = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
        if (value != kFiller) dense[column] = value;
      }
    }
  }
}

// Warps per row: enough rows in flight to fill the card, but no warp without a chunk.
int team_size(const Product& p, int warps) {
  int team = 1;
  while (team < 8 && p.rows * team * 2 <= warps && p.cols > 512 * team) team *= 2;
  return team;
}

template <class T, int kTokens>
cudaError_t launch(const DeltaWeight& w, const Product& p, const Device& card, cudaStream_t stream) {
  // A multiprocessor that holds 1536 threads takes three blocks of 512 sooner than one of 1024.
  const int threads = card.threads % 1024 == 0 ? most_threads(kTokens) : 512;
  const int warps = threads / kLanes;
  const int shared = (p.cols + kColumnSlack + 7) / 8 * 8 * static_cast<int>(sizeof(typename Column<kTokens>::Word)) +
                     warps * kTokens * static_cast<int>(sizeof(float));
  if (shared > card.shared_block - 1024) return cudaErrorInvalidValue;  // there are static words, too
  const int fit = threads == 1024 || kTokens == 8 ? 1 : card.threads / threads;  // by registers
  const int blocks = max(1, min(fit, card.shared_total / (shared + 1024)));
  const int team = team_size(p, card.multiprocessors * blocks * warps);
  const int grid = min(card.multiprocessors * blocks, p.rows);
  const cudaError_t error = allow_shared(delta_linear_kernel<T, kTokens>, shared);
  if (error) return error;
  delta_linear_kernel<T, kTokens><<<grid, threads, shared, stream>>>(w, p, team);
  return cudaGetLastError();
}

template <class T>
cudaError_t choose(const DeltaWeight& w, const Product& p, const Device& card, cudaStream_t stream) {
  if (p.tokens <= 1) return launch<T, 1>(w, p, card, stream);
  if (p.tokens <= 2) return launch<T, 2>(w, p, card, stream);
  if (p.tokens <= 4) return launch<T, 4>(w, p, card, stream);
  if (p.tokens <= 8) return launch<T, 8>(w, p, card, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

int delta_linear(const DeltaWeight& w, const Product& p, const Target& target) {
  const DeviceGuard guard(target.device);
  Device card{};
  if (guard.error()) return guard.error();
  if (const cudaError_t error = describe(target.device, card)) return error;
  if (p.rows == 0 || p.tokens == 0) return cudaSuccess;
  return p.dtype == DType::kBFloat16 ? choose<__nv_bfloat16>(w, p, card, stream_of(target))
                                     : choose<__half>(w, p, card, stream_of(target));
}

int delta_unpack(const DeltaWeight& w, const Rows& r, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  if (r.rows == 0 || r.cols == 0) return cudaSuccess;
  constexpr int kWarps = 8;
  // 16-bit words move as they are, so one instance serves both types.
  delta_unpack_kernel<__half><<<static_cast<int>(ceil_div(r.rows, kWarps)), kWarps * kLanes, 0, stream_of(target)>>>(w, r);
  return cudaGetLastError();
}

}  // namespace pysparse::cuda
