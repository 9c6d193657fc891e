// y = x W^T for rows of 4-bit column steps: some 7 instructions per stored weight whatever the
// density, x in shared memory as one word per column that holds all tokens, one or more warps per
// row.
#include "columns.cuh"

namespace pysparse::cuda {
namespace {

// Columns of x in shared memory, whole vectors of 8: steps past the last column meet zeros.
__device__ __host__ constexpr int staged_columns(int cols) {
  return (cols + kColumnSlack + 7) / 8 * 8;
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
  const unsigned poisoned = stage<T, kTokens>(p, staged_columns(p.cols), columns);
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
    finish<T, kTokens>(p, row, kLanes, team, sums, partial, poisoned);
    row += step;
    next = after;
  }
}

// One row per thread block.
__global__ __launch_bounds__(kUnpackThreads) void delta_unpack_kernel(DeltaWeight w, Rows r) {
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x % kLanes, row = r.first_row + static_cast<int>(blockIdx.x);
  const int begin = w.row_groups[row], end = w.row_groups[row + 1];
  write_row(r, shared, [&](uint16_t* staged, int first, int size) {
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
  });
}

template <class T, int kTokens>
cudaError_t launch(const DeltaWeight& w, const Product& p, const Device& card,
                   cudaStream_t stream) {
  RowPlan plan{};
  cudaError_t error = plan_rows<kTokens>(p, card, staged_columns(p.cols), 8, plan);
  if (!error) error = allow_shared(delta_linear_kernel<T, kTokens>, plan.shared);
  if (error) return error;
  return launch_early(delta_linear_kernel<T, kTokens>, dim3(static_cast<unsigned>(plan.grid)),
                      plan.threads, plan.shared, card, stream, w, p, plan.team);
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
  delta_unpack_kernel<<<r.rows, kUnpackThreads, unpack_shared(r.cols), stream_of(target)>>>(w, r);
  return cudaGetLastError();
}

}  // namespace pysparse::cuda
