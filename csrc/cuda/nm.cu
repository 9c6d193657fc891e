// y = x W^T for rows whose groups of m columns hold n entries each: a lane's columns follow from
// its place, so there is no scan and no row has its own length; x in shared memory as one word per
// column that holds all tokens, several lanes or warps per row.
#include "columns.cuh"

namespace pysparse::cuda {
namespace {

// The places of a vector's 8 entries, kBits each. Words of 3 bits are kept as 16 bits and, behind
// those of the whole weight (`high`), 8.
template <int kBits>
__device__ __forceinline__ uint32_t load_places(const uint8_t* places, const uint8_t* high,
                                                uint32_t vector) {
  if constexpr (kBits == 4) {
    return __ldcs(reinterpret_cast<const uint32_t*>(places) + vector);
  } else {
    const uint32_t low = __ldcs(reinterpret_cast<const uint16_t*>(places) + vector);
    if constexpr (kBits == 2) return low;
    return low | static_cast<uint32_t>(__ldcs(high + vector)) << 16;
  }
}

// Where the second parts of 3-bit words lie.
__device__ __forceinline__ const uint8_t* high_places(const NmWeight& w, int rows, int vectors) {
  return w.places + 2 * static_cast<int64_t>(rows) * vectors;
}

// One lane's share of a chunk: a vector of each of two blocks.
struct Share {
  uint4 values[2];
  uint32_t places[2];
};

// Fetches the lane's vectors of the blocks that start at runs `first` and `first` + full; `own` is
// its run in a block, none of theirs for a lane without one.
template <int kBits>
__device__ __forceinline__ void fetch(const NmWeight& w, const NmRows& shape, const uint8_t* high,
                                      int row, int first, int lane, int own, Share& share) {
  const int full = shape.block_runs();
  const auto vector = static_cast<uint32_t>(row * shape.vectors() + first * shape.n + lane);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (first + h * full + own >= shape.runs) continue;
    const uint32_t at = vector + static_cast<uint32_t>(h * full * shape.n);
    share.values[h] = __ldcs(static_cast<const uint4*>(w.values) + at);
    share.places[h] = load_places<kBits>(w.places, high, at);
  }
}

// `column`: the first group's; the others follow at distances of `step` bytes.
template <class T, int kTokens, int kBits>
__device__ __forceinline__ void multiply(uint4 values, uint32_t places,
                                         const typename Column<kTokens>::Word* column, int step,
                                         float (&sums)[kTokens]) {
  using Word = typename Column<kTokens>::Word;
  constexpr int kShift = sizeof(Word) == 4 ? 2 : sizeof(Word) == 8 ? 3 : 4;
  constexpr uint32_t kMask = ((1u << kBits) - 1) << kShift;
  const auto* group = reinterpret_cast<const char*>(column);
  const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int j = 0; j < kVectorEntries; ++j) {
    const int by = kBits * j - kShift;  // the place arrives as an offset in bytes
    const uint32_t offset = (by >= 0 ? places >> (by & 31) : places << (-by & 31)) & kMask;
    const float weight = j % 2 ? high_value<T>(words[j / 2]) : low_value<T>(words[j / 2]);
    add<T>(sums, weight, *reinterpret_cast<const Word*>(group + offset));
    group += step;
  }
}

template <class T, int kTokens, int kBits>
__global__ __launch_bounds__(most_threads(kTokens), 1) void nm_linear_kernel(NmWeight w, Product p,
                                                                             NmRows shape,
                                                                             int team) {
  extern __shared__ uint4 shared[];
  using Word = typename Column<kTokens>::Word;
  auto* columns = reinterpret_cast<Word*>(shared);
  auto* partial = reinterpret_cast<float*>(columns + shape.columns());
  const int lane = threadIdx.x % shape.width, squad = threadIdx.x / shape.width;
  const int full = shape.block_runs(), chunk = 2 * full;  // in runs
  // Lanes that hold no run of a block stand behind all runs.
  const int own = lane < full * shape.n ? lane / shape.n : shape.runs;
  const int begin = squad % team * chunk;
  const int step = gridDim.x * (blockDim.x / shape.width / team);
  const uint8_t* high = high_places(w, p.rows, shape.vectors());
  // Neighbouring rows go to different multiprocessors: all of them get the same number to within
  // one.
  int row = blockIdx.x + gridDim.x * (squad / team);
  Share share{};
  if (row < p.rows)  // on its way while x is staged
    fetch<kBits>(w, shape, high, row, begin, lane, own, share);
  wait_for_inputs();
  const unsigned poisoned = stage<T, kTokens>(p, shape.columns(), columns);
  for (int base = 0; base < p.rows; base += step) {
    float sums[kTokens] = {};
    for (int first = begin; first < shape.runs; first += team * chunk) {
      const Share now = share;
      const int after = first + team * chunk;
      const bool more = after < shape.runs;
      const int next = more ? row : row + step;
      if (next < p.rows) fetch<kBits>(w, shape, high, next, more ? after : begin, lane, own, share);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int start = first + h * full, runs = min(full, shape.runs - start);
        if (own < runs)
          multiply<T, kTokens, kBits>(now.values[h], now.places[h],
                                      columns + ((start * kVectorEntries + own) << kBits),
                                      runs * static_cast<int>(sizeof(Word)) << kBits, sums);
      }
    }
    finish<T, kTokens>(p, row, shape.width, team, sums, partial, poisoned);
    row += step;
  }
}

// One row per thread block.
template <int kBits>
__global__ __launch_bounds__(kUnpackThreads) void nm_unpack_kernel(NmWeight w, Rows r,
                                                                   NmRows shape) {
  extern __shared__ uint4 shared[];
  const int begin = (r.first_row + static_cast<int>(blockIdx.x)) * shape.vectors();
  const uint8_t* high = high_places(w, r.total_rows, shape.vectors());
  write_row(r, shared, [&](uint16_t* staged, int first, int size) {
    for (int v = threadIdx.x; v < shape.vectors(); v += kUnpackThreads) {
      const uint4 values = __ldcs(static_cast<const uint4*>(w.values) + begin + v);
      const uint32_t places = load_places<kBits>(w.places, high, static_cast<uint32_t>(begin + v));
      const uint32_t words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
      for (int j = 0; j < kVectorEntries; ++j) {
        const auto value = static_cast<uint16_t>(words[j / 2] >> 16 * (j % 2));
        const int column = (shape.group(v, j) << kBits) - first +
                           static_cast<int>(places >> kBits * j & ((1u << kBits) - 1));
        if (value != kFiller && column >= 0 && column < size) staged[column] = value;
      }
    }
  });
}

// Warps that may share a row. Rows that fewer lanes than a warp share are short: nothing is left to
// divide.
int most_team(const NmRows& shape) {
  return shape.width < kLanes ? 1 : min(8, (shape.blocks() + 1) / 2);
}

template <class T, int kTokens, int kBits>
cudaError_t launch(const NmWeight& w, const Product& p, const Device& card, cudaStream_t stream) {
  const NmRows shape = nm_rows(w.n, w.bits, p.cols);
  RowPlan plan{};
  cudaError_t error = plan_rows<kTokens>(p, card, shape.columns(), most_team(shape), plan);
  if (!error) error = allow_shared(nm_linear_kernel<T, kTokens, kBits>, plan.shared);
  if (error) return error;
  return launch_early(nm_linear_kernel<T, kTokens, kBits>, dim3(static_cast<unsigned>(plan.grid)),
                      plan.threads, plan.shared, card, stream, w, p, shape, plan.team);
}

template <class T, int kBits>
cudaError_t choose_tokens(const NmWeight& w, const Product& p, const Device& card,
                          cudaStream_t stream) {
  if (p.tokens <= 1) return launch<T, 1, kBits>(w, p, card, stream);
  if (p.tokens <= 2) return launch<T, 2, kBits>(w, p, card, stream);
  if (p.tokens <= 4) return launch<T, 4, kBits>(w, p, card, stream);
  if (p.tokens <= 8) return launch<T, 8, kBits>(w, p, card, stream);
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t choose(const NmWeight& w, const Product& p, const Device& card, cudaStream_t stream) {
  if (w.bits == 2) return choose_tokens<T, 2>(w, p, card, stream);
  if (w.bits == 3) return choose_tokens<T, 3>(w, p, card, stream);
  return choose_tokens<T, 4>(w, p, card, stream);
}

// Packers make no other weights; a wrong one is refused before it divides by zero.
bool is_weight(const NmWeight& w, int rows, int cols) {
  if (w.bits < kNmLeastBits || w.bits > kNmMostBits || w.n < 1 || w.n >= 1 << w.bits) return false;
  return static_cast<int64_t>(rows) * nm_rows(w.n, w.bits, cols).vectors() <= kNmMostVectors;
}

}  // namespace

int nm_linear(const NmWeight& w, const Product& p, const Target& target) {
  const DeviceGuard guard(target.device);
  Device card{};
  if (guard.error()) return guard.error();
  if (const cudaError_t error = describe(target.device, card)) return error;
  if (!is_weight(w, p.rows, p.cols)) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.tokens == 0) return cudaSuccess;
  return p.dtype == DType::kBFloat16 ? choose<__nv_bfloat16>(w, p, card, stream_of(target))
                                     : choose<__half>(w, p, card, stream_of(target));
}

int nm_unpack(const NmWeight& w, const Rows& r, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  if (!is_weight(w, r.total_rows, r.cols)) return cudaErrorInvalidValue;
  if (r.rows == 0 || r.cols == 0) return cudaSuccess;
  // 16-bit words move as they are, so one instance serves both types.
  const NmRows shape = nm_rows(w.n, w.bits, r.cols);
  const auto start = [&](auto* kernel) {
    kernel<<<r.rows, kUnpackThreads, unpack_shared(r.cols), stream_of(target)>>>(w, r, shape);
  };
  if (w.bits == 2)
    start(nm_unpack_kernel<2>);
  else if (w.bits == 3)
    start(nm_unpack_kernel<3>);
  else
    start(nm_unpack_kernel<4>);
  return cudaGetLastError();
}

}  // namespace pysparse::cuda
