// Which keys a group of queries is to meet: pooled queries against keys on the tensor cores, a bit
// for every key, and lists from the bits.
#include "attention.h"
#include "attention_tile.cuh"

namespace pysparse::cuda {
namespace {

constexpr int kSearchWarps = 4, kSearchThreads = kSearchWarps * kLanes;  // a group each
constexpr int kPooledRows = 16;                                          // at most, in a group
constexpr int kSearchKeys = 64, kSearchTiles = 16;  // keys in a tile, tiles in a thread block
constexpr int kListWarps = 8;

PYSPARSE_HD constexpr int search_shared(int dim) {
  return (2 * kSearchKeys + kSearchWarps * kPooledRows) * dim * 2;
}

__device__ __forceinline__ uint32_t warp_or(uint32_t value) {
#pragma unroll
  for (int d = kLanes / 2; d; d /= 2) value |= __shfl_xor_sync(kFullWarp, value, d);
  return value;
}

// Starts the copy of keys [first, first + 64); those from `end` on become zeros.
template <int kDim>
__device__ __forceinline__ void stage_search_keys(char* tile, const uint16_t* k, int64_t stride,
                                                  int first, int end) {
  constexpr int kUnits = kDim / 8;
#pragma unroll 4
  for (int at = threadIdx.x; at < kSearchKeys * kUnits; at += kSearchThreads) {
    const int row = at / kUnits, unit = at % kUnits;
    const bool present = first + row < end;
    copy_unit_or_zero(tile + unit_place<kDim>(row, unit),
                      k + static_cast<int64_t>(present ? first + row : 0) * stride + 8 * unit,
                      present);
  }
  commit_copies();
}

// Bits of the 64 keys of a tile that one of the warp's pooled rows keeps.
template <class T, int kDim>
__device__ __forceinline__ void search_tile(const char* pooled, const char* keys,
                                            const float (&floor)[2], float scale,
                                            uint32_t (&bits)[2]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  float scores[kSearchKeys / 8][4] = {};
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    uint32_t a[4];
    load_matrices(a, pooled + unit_place<kDim>(lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int j = 0; j < kSearchKeys / 8; j += 2) {
      uint32_t b[4];
      load_matrices(
          b, keys + unit_place<kDim>(8 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      mma<T>(scores[j], a, b[0], b[1]);
      mma<T>(scores[j + 1], a, b[2], b[3]);
    }
  }
  bits[0] = bits[1] = 0;
#pragma unroll
  for (int j = 0; j < kSearchKeys / 8; ++j)
#pragma unroll
    for (int s = 0; s < 4; ++s)
      if (!(scores[j][s] * scale < floor[s / 2]))
        bits[j / 4] |= 1u << (8 * (j % 4) + 2 * (lane % 4) + s % 2);
  bits[0] = warp_or(bits[0]);
  bits[1] = warp_or(bits[1]);
}

// Clears the bits of keys outside [begin, end); the word's first key is `first`.
__device__ __forceinline__ uint32_t inside(uint32_t bits, int first, int begin, int end) {
  const int low = min(max(begin - first, 0), 32), high = min(max(end - first, 0), 32);
  const uint32_t below_high = high == 32 ? ~0u : (1u << high) - 1;
  const uint32_t below_low = low == 32 ? ~0u : (1u << low) - 1;
  return bits & below_high & ~below_low;
}

template <class T, int kDim>
__global__ __launch_bounds__(kSearchThreads) void find_stripes_kernel(StripeSearch s) {
  extern __shared__ __align__(16) char shared[];
  constexpr int kKeyBytes = kSearchKeys * kDim * 2, kPooledBytes = kPooledRows * kDim * 2;
  const int lane = static_cast<int>(threadIdx.x) % kLanes,
            warp = static_cast<int>(threadIdx.x) / kLanes;
  const int quads = (s.groups + kSearchWarps - 1) / kSearchWarps;
  const int head = static_cast<int>(blockIdx.y) / quads, batch = static_cast<int>(blockIdx.z);
  const int first_group = static_cast<int>(blockIdx.y) % quads * kSearchWarps;
  const int group = first_group + warp;
  const int start = s.first_key ? __ldg(s.first_key + batch) : 0, low = start + s.head_keys;
  const auto end_of = [&](int g) { return min(s.keys, start + g * s.group - s.extra_keys); };
  const int begin = static_cast<int>(blockIdx.x) * kSearchKeys * kSearchTiles;
  const int end = min(begin + kSearchKeys * kSearchTiles,
                      end_of(min(first_group + kSearchWarps, s.groups) - 1));
  // Later groups have more candidates: none of these has one here, or none has queries.
  if (begin >= end || first_group + kSearchWarps <= s.first_group) return;

  char* pooled = shared + 2 * kKeyBytes + warp * kPooledBytes;
  const auto* source =
      static_cast<const uint16_t*>(s.pooled.data) + batch * s.pooled.batch + head * s.pooled.head;
  const int64_t first_row = static_cast<int64_t>(group) * s.rows;
  constexpr int kUnits = kDim / 8;
  for (int at = lane; at < kPooledRows * kUnits; at += kLanes) {
    const int row = at / kUnits, unit = at % kUnits;
    const bool present = row < s.rows && group < s.groups;
    copy_unit_or_zero(pooled + unit_place<kDim>(row, unit),
                      source + (present ? first_row + row : 0) * s.pooled.row + 8 * unit, present);
  }
  float floor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    const int64_t at =
        (static_cast<int64_t>(batch) * s.heads + head) * s.groups * s.rows + first_row + row;
    floor[h] = row < s.rows && group < s.groups ? __ldg(s.floor + at) : INFINITY;
  }
  const auto* k = static_cast<const uint16_t*>(s.k.data) + batch * s.k.batch +
                  head / (s.heads / s.kv_heads) * s.k.head;
  uint32_t* bits =
      s.bits + ((static_cast<int64_t>(batch) * s.heads + head) * s.groups + group) * s.words;

  stage_search_keys<kDim>(shared, k, s.k.row, begin, end);
#pragma unroll 1
  for (int first = begin, turn = 0; first < end; first += kSearchKeys, turn ^= 1) {
    wait_copies<0>();
    __syncthreads();  // these keys have landed, and no warp reads the other buffer any more
    if (first + kSearchKeys < end)
      stage_search_keys<kDim>(shared + (turn ^ 1) * kKeyBytes, k, s.k.row, first + kSearchKeys,
                              end);
    uint32_t found[2];
    search_tile<T, kDim>(pooled, shared + turn * kKeyBytes, floor, s.scale, found);
    if (lane < 2 && group < s.groups && first / 32 + lane < s.words)
      bits[first / 32 + lane] =
          inside(lane ? found[1] : found[0], first + 32 * lane, low, min(end, end_of(group)));
  }
}

__global__ __launch_bounds__(kListWarps* kLanes) void count_stripes_kernel(const uint32_t* bits,
                                                                           int64_t rows, int words,
                                                                           int64_t* counts) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kListWarps + threadIdx.x / kLanes;
  if (row >= rows) return;
  int count = 0;
  for (int w = lane; w < words; w += kLanes) count += __popc(__ldg(bits + row * words + w));
#pragma unroll
  for (int d = kLanes / 2; d; d /= 2) count += __shfl_xor_sync(kFullWarp, count, d);
  if (lane == 0) counts[row] = count;
}

__global__ __launch_bounds__(kListWarps* kLanes) void list_stripes_kernel(const uint32_t* bits,
                                                                          int64_t rows, int words,
                                                                          const int64_t* offsets,
                                                                          int32_t* indices) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kListWarps + threadIdx.x / kLanes;
  if (row >= rows) return;
  int64_t next = offsets[row];
  for (int first = 0; first < words; first += kLanes) {
    uint32_t word = first + lane < words ? __ldg(bits + row * words + first + lane) : 0u;
    int before = __popc(word);
    const int own = before;
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
      const int lower = __shfl_up_sync(kFullWarp, before, d);
      if (lane >= d) before += lower;
    }
    int64_t at = next + before - own;
    for (; word; word &= word - 1) indices[at++] = (first + lane) * 32 + __ffs(word) - 1;
    next += __shfl_sync(kFullWarp, before, kLanes - 1);
  }
}

template <class T, int kDim>
cudaError_t launch(const StripeSearch& s, cudaStream_t stream) {
  auto* kernel = find_stripes_kernel<T, kDim>;
  if (const cudaError_t error = allow_shared(kernel, search_shared(kDim))) return error;
  const int64_t heads = s.heads * ceil_div(s.groups, kSearchWarps);
  if (heads > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(ceil_div(s.keys, kSearchKeys * kSearchTiles)),
                  static_cast<unsigned>(heads), static_cast<unsigned>(s.batch));
  kernel<<<grid, kSearchThreads, search_shared(kDim), stream>>>(s);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_dim(const StripeSearch& s, cudaStream_t stream) {
  switch (s.dim) {
    case 64:
      return launch<T, 64>(s, stream);
    case 128:
      return launch<T, 128>(s, stream);
    case 256:
      return launch<T, 256>(s, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

unsigned list_blocks(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, kListWarps)); }

}  // namespace

int find_stripes(const StripeSearch& s, const Target& target) {
  if (s.batch == 0 || s.heads == 0 || s.groups == 0 || s.keys == 0) return cudaSuccess;
  if (s.rows < 1 || s.rows > kPooledRows || s.kv_heads < 1 || s.heads % s.kv_heads || s.group < 1 ||
      s.batch > 65535 || static_cast<int64_t>(s.words) * 32 < s.keys)
    return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  return s.dtype == DType::kBFloat16 ? launch_dim<__nv_bfloat16>(s, stream_of(target))
                                     : launch_dim<__half>(s, stream_of(target));
}

int count_stripes(const uint32_t* bits, int64_t rows, int words, int64_t* counts,
                  const Target& target) {
  if (rows == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  count_stripes_kernel<<<list_blocks(rows), kListWarps * kLanes, 0, stream_of(target)>>>(
      bits, rows, words, counts);
  return cudaGetLastError();
}

int list_stripes(const uint32_t* bits, int64_t rows, int words, const int64_t* offsets,
                 int32_t* indices, const Target& target) {
  if (rows == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  list_stripes_kernel<<<list_blocks(rows), kListWarps * kLanes, 0, stream_of(target)>>>(
      bits, rows, words, offsets, indices);
  return cudaGetLastError();
}

}  // namespace pysparse::cuda
