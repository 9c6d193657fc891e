// y = x W^T for rows of 4-bit column steps: some 7 instructions per stored weight whatever the
// density, x in shared memory as one word per column that holds all tokens, one or more warps per
// row.
#include "launch.cuh"

namespace pysparse::cuda {
namespace {

// What a multiprocessor's 65536 registers hold: 1024 threads at 64; eight sums per lane need more
// of them.
constexpr int most_threads(int tokens) { return tokens <= 4 ? 1024 : 512; }

// Columns of x in shared memory, whole vectors of 8: steps past the last column meet zeros.
__device__ __host__ constexpr int staged_columns(int cols) {
  return (cols + kColumnSlack + 7) / 8 * 8;
}

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

// Fills columns [0, cols + slack) and returns (to all threads) the bit set of tokens that hold Inf
// or NaN.
template <class T, int kTokens>
__device__ unsigned stage(const Product& p, typename Column<kTokens>::Word* columns) {
  __shared__ unsigned poisoned;
  if (threadIdx.x == 0) poisoned = 0;
  __syncthreads();  // the flag is zero before anyone sets it
  for (int c = 8 * static_cast<int>(threadIdx.x); c < staged_columns(p.cols);
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

// Where a warp stands in a row: the groups [group, end) are left to it and its team, chunk by
// chunk.
struct Cursor {
  int group, end, slot;  // slot: of the chunk's starting column
};

__device__ __forceinline__ Cursor open_row(const DeltaWeight& w, int row, int rows, int chunk) {
  if (row >= rows) return {0, 0, 0};
  const int begin = __ldg(w.row_groups + row), end = __ldg(w.row_groups + row + 1);
  return {begin + chunk * kChunkGroups, end, static_cast<int>(chunk_slot(row, begin, chunk))};
}

// One lane's share of a chunk: group `lane` and group `lane + 32`. What lies past the row's end is
// not read: no lane before it needs it.
struct Share {
  uint4 values[2];
  uint32_t deltas[2];
  int column, groups;  // start of the chunk, and its groups
};

__device__ __forceinline__ void fetch(const DeltaWeight& w, const Cursor& at, int lane,
                                      Share& share) {
  share.groups = min(kChunkGroups, at.end - at.group);
  if (share.groups <= 0) return;
  share.column = __ldg(w.chunk_cols + at.slot);
  const auto* values = static_cast<const uint4*>(w.values) + at.group + lane;
  const uint32_t* deltas = w.deltas + at.group + lane;
#pragma unroll
  for (int h = 0; h < 2; ++h)
    if (lane + kLanes * h < share.groups) {
      share.values[h] = __ldcs(values + kLanes * h);
      share.deltas[h] = __ldcs(deltas + kLanes * h);
    }
}

// Columns that the 8 steps of a group span.
__device__ __forceinline__ uint32_t span(uint32_t deltas) {
  const uint32_t pairs = (deltas & 0x0f0f0f0fu) + (deltas >> 4 & 0x0f0f0f0fu);
  return (pairs * 0x01010101u >> 24) + kGroupEntries;
}

// Column before the first entry of each of the lane's two groups: one scan for both, in halves of a
// word (32 groups span at most 32 * 128 columns, which 16 bits hold).
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
__device__ __forceinline__ void walk(uint4 values, uint32_t deltas,
                                     const typename Column<kTokens>::Word* before,
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

// Lane sums to the row's result; with several warps per row, through shared memory in a fixed
// order.
template <class T, int kTokens>
__device__ __forceinline__ void finish(const Product& p, int row, int team, float (&sums)[kTokens],
                                       float* partial, unsigned poisoned) {
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
      const float poison =
          poisoned >> t & 1u ? __uint_as_float(0x7fc00000u) : 0.f;  // a dense product meets 0 * Inf
      static_cast<T*>(p.y)[static_cast<int64_t>(t) * p.rows + row] =
          narrow<T>(sums[t] + bias + poison);
    }
}

template <class T, int kTokens>
__global__ __launch_bounds__(most_threads(kTokens)) void delta_linear_kernel(DeltaWeight w,
                                                                             Product p, int team) {
  extern __shared__ uint4 shared[];
  auto* columns = reinterpret_cast<typename Column<kTokens>::Word*>(shared);
  auto* partial = reinterpret_cast<float*>(columns + staged_columns(p.cols));
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int step = gridDim.x * (blockDim.x / kLanes / team);
  const int member = warp % team;
  // Neighbouring rows go to different multiprocessors: all of them get the same number to within
  // one.
  int row = blockIdx.x + gridDim.x * (warp / team);
  Cursor at = open_row(w, row, p.rows, member), next = open_row(w, row + step, p.rows, member);
  Share share{};
  fetch(w, at, lane, share);  // on its way while x is staged
  wait_for_inputs();
  const unsigned poisoned = stage<T, kTokens>(p, columns);
  for (int base = 0; base < p.rows; base += step) {
    const Cursor after =
        open_row(w, row + 2 * step, p.rows, member);  // known before the last chunk of `next`
    float sums[kTokens] = {};
    bool more = share.groups > 0;
    if (!more) {  // the row has fewer chunks than the team has warps
      at = next;
      fetch(w, at, lane, share);
    }
    while (more) {
      const int2 before = starts(share, lane);
      const Share now = share;
      at.group += team * kChunkGroups, at.slot += team;
      more = at.group < at.end;
      if (!more) at = next;
      fetch(w, at, lane, share);
      if (lane < now.groups)
        walk<T, kTokens>(now.values[0], now.deltas[0], columns + before.x, sums);
      if (lane + kLanes < now.groups)
        walk<T, kTokens>(now.values[1], now.deltas[1], columns + before.y, sums);
    }
    finish<T, kTokens>(p, row, team, sums, partial, poisoned);
    row += step;
    next = after;
  }
}

constexpr int kUnpackThreads = 128;
constexpr int kUnpackColumns = 24 << 10;  // of a row that are in shared memory at a time: 48 KB

// Writes rows out densely, one per thread block: weights go to their columns in shared memory,
// whole vectors leave.
__global__ __launch_bounds__(kUnpackThreads) void delta_unpack_kernel(DeltaWeight w, Rows r) {
  extern __shared__ uint4 shared[];
  auto* staged = reinterpret_cast<uint16_t*>(shared);
  const int lane = threadIdx.x % kLanes, row = r.first_row + static_cast<int>(blockIdx.x);
  const int begin = w.row_groups[row], end = w.row_groups[row + 1];
  for (int first = 0; first < r.cols; first += kUnpackColumns) {
    const int size = min(kUnpackColumns, r.cols - first);
    for (int v = threadIdx.x; v < (size + 7) / 8; v += kUnpackThreads) shared[v] = uint4{};
    __syncthreads();  // zeros are there before any weight
    for (int chunk = threadIdx.x / kLanes; chunk * kChunkGroups < end - begin;
         chunk += kUnpackThreads / kLanes) {
      Share share{};
      fetch(w, {begin + chunk * kChunkGroups, end, static_cast<int>(chunk_slot(row, begin, chunk))},
            lane, share);
      const int2 before = starts(share, lane);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (lane + kLanes * h >= share.groups) continue;
        const uint32_t words[4] = {share.values[h].x, share.values[h].y, share.values[h].z,
                                   share.values[h].w};
        int column = (h ? before.y : before.x) - first;
#pragma unroll
        for (int i = 0; i < kGroupEntries; ++i) {
          column += static_cast<int>(share.deltas[h] >> 4 * i & 15u) + 1;
          const auto value = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
          if (value != kFiller && column >= 0 && column < size) staged[column] = value;
        }
      }
    }
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

// Warps per row: enough rows in flight to fill the card, but no warp without a chunk.
int team_size(const Product& p, int warps, int warps_per_block) {
  int team = 1;
  while (team < min(8, warps_per_block) && p.rows * team * 2 <= warps && p.cols > 512 * team)
    team *= 2;
  return team;
}

template <class T, int kTokens>
cudaError_t launch(const DeltaWeight& w, const Product& p, const Device& card,
                   cudaStream_t stream) {
  const auto shared_for = [&](int threads) {
    return staged_columns(p.cols) * static_cast<int>(sizeof(typename Column<kTokens>::Word)) +
           threads / kLanes * kTokens * static_cast<int>(sizeof(float));
  };
  // Two thread blocks overlap at the ends of a kernel, which pays until staging x twice costs more.
  constexpr int kMost = most_threads(kTokens), kCheap = 48 << 10;
  const int blocks = shared_for(kMost / 2) <= min(kCheap, card.shared_total / 2 - 1024) ? 2 : 1;
  const int threads = kMost / blocks, shared = shared_for(threads);
  if (shared > card.shared_block - 1024)
    return cudaErrorInvalidValue;  // there are static words, too
  const int team = team_size(p, card.multiprocessors * (kMost / kLanes), threads / kLanes);
  const int grid = min(card.multiprocessors * blocks, p.rows);
  const cudaError_t error = allow_shared(delta_linear_kernel<T, kTokens>, shared);
  if (error) return error;
  return launch_early(delta_linear_kernel<T, kTokens>, dim3(static_cast<unsigned>(grid)), threads,
                      shared, card, stream, w, p, team);
}

template <class T>
cudaError_t choose(const DeltaWeight& w, const Product& p, const Device& card,
                   cudaStream_t stream) {
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
  // 16-bit words move as they are, so one instance serves both types.
  const int shared = static_cast<int>(ceil_div(min(kUnpackColumns, r.cols), 8)) * 16;
  delta_unpack_kernel<<<r.rows, kUnpackThreads, shared, stream_of(target)>>>(w, r);
  return cudaGetLastError();
}

}  // namespace pysparse::cuda
