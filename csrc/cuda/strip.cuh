#pragma once
// y = x W^T for weights in blocks of 16 rows x 64 columns, on the tensor cores, for 1 to 64 tokens. Each warp
// streams its blocks of one strip through its own ring in shared memory; the warps of a strip share its columns
// and add up at the end. What a block looks like is the tile object's business: FragmentTile, PairTile.
#include <type_traits>

#include "pipe.cuh"

namespace pysparse::cuda {

// Warps per thread block: the sums of 64 tokens need more registers than 16 warps leave each other.
PYSPARSE_HD constexpr int most_warps(int tiles) { return tiles == 8 ? 8 : 16; }

// How a launch is cut: the host decides, the kernel follows.
struct Cut {
  int warps, strips;  // per thread block; warps / strips of them share a strip
  int splits;         // parts of the columns over thread blocks; above 1, sums go to the workspace
  int blocks;         // blocks of 64 columns per part
  int staged;         // blocks of 64 columns of x that are in shared memory at a time
  int stage_bytes;    // one slot of a warp's ring
};

PYSPARSE_HD constexpr int staged_stride(int staged) { return staged * kBlockCols * 2 + 16; }  // bytes; the 16 turn the banks

// One warp's walk over the blocks first, first + step, ... below end of a strip.
template <int kStages>
class Ring {
 public:
  // row: index of the strip's first block.
  __device__ Ring(const StripWeight& w, char* slots, int slot_bytes, int64_t row, int first, int step, int end)
      : stream_(w.offsets ? w.stream : w.stream + row * kPairBlockBytes),
        offsets_(w.offsets ? w.offsets + row : nullptr),
        slots_(slots), slot_bytes_(slot_bytes), first_(first), step_(step), end_(end) {}

  // Starts the copy of the i-th block; calls must be in order. Always commits a group, so waits can count.
  __device__ __forceinline__ void prefetch(int i) {
    if (i % kLanes == 0) look_up(i);
    const int begin = __shfl_sync(kFullWarp, begin_, i % kLanes), units = __shfl_sync(kFullWarp, units_, i % kLanes);
    const uint8_t* source = stream_ + static_cast<int64_t>(begin) * kUnitBytes;
    char* slot = slots_ + i % kStages * slot_bytes_;
    for (int u = static_cast<int>(threadIdx.x) % kLanes; u < units; u += kLanes) copy_unit(slot + u * kUnitBytes, source + u * kUnitBytes);
    commit_copies();
  }
  __device__ __forceinline__ const char* wait(int i) {
    wait_copies<kStages - 1>();
    __syncwarp();  // every lane's copies have landed, not only this one's
    return slots_ + i % kStages * slot_bytes_;
  }

 private:
  // Loads the places of the next 32 blocks, one per lane.
  __device__ __forceinline__ void look_up(int i) {
    const int block = first_ + step_ * (i + static_cast<int>(threadIdx.x) % kLanes);
    begin_ = units_ = 0;
    if (block >= end_) return;
    if (offsets_) {
      begin_ = __ldg(offsets_ + block);
      units_ = __ldg(offsets_ + block + 1) - begin_;
    } else {
      units_ = kPairBlockBytes / kUnitBytes;
      begin_ = block * units_;
    }
  }

  const uint8_t* stream_;
  const int32_t* offsets_;
  char* slots_;
  int slot_bytes_;
  int first_, step_, end_;
  int begin_ = 0, units_ = 0;
};

// Copies columns [64 first, 64 (first + staged)) of all tokens to shared memory, in the tile's order of words and
// with zeros past the last column. Marks tokens that hold Inf or NaN where the tile asks for it.
template <class Tile, class T>
__device__ void stage_inputs(const Product& p, const Cut& cut, int first, char* staged, unsigned long long* poisoned) {
  const int vectors = cut.staged * (kBlockCols / 8), stride = staged_stride(cut.staged);
  for (int i = threadIdx.x; i < vectors * p.tokens; i += blockDim.x) {
    const int token = i / vectors, v = i % vectors, col = first * kBlockCols + 8 * v;
    const auto* source = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(token) * p.cols + col;
    uint32_t words[4] = {};
    if (p.cols % 8 == 0) {
      if (col < p.cols) {
        const uint4 all = __ldg(reinterpret_cast<const uint4*>(source));
        words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
      }
    } else {
#pragma unroll
      for (int h = 0; h < 8; ++h)
        if (col + h < p.cols) words[h / 2] |= static_cast<uint32_t>(source[h]) << 16 * (h % 2);
    }
    char* target = staged + token * stride + v / 8 * (kBlockCols * 2);
#pragma unroll
    for (int h = 0; h < 4; ++h) *reinterpret_cast<uint32_t*>(target + 4 * Tile::input_word(v % 8 * 4 + h)) = words[h];
    if constexpr (Tile::kSkipsZeros)
      if (any_not_finite<T>(words[0]) || any_not_finite<T>(words[1]) || any_not_finite<T>(words[2]) ||
          any_not_finite<T>(words[3]))
        atomicOr(poisoned, 1ull << token);
  }
}

// Adds up the warps of each strip in a fixed order and writes results, or this part's sums to the workspace.
template <class T, int kTiles>
__device__ void finish_strips(const Product& p, const Cut& cut, const float* partial, float* workspace,
                              unsigned long long poisoned) {
  const int rows = cut.strips * kStripRows, first_row = blockIdx.x * rows, team = cut.warps / cut.strips;
  for (int i = threadIdx.x; i < rows * min(p.tokens, 8 * kTiles); i += blockDim.x) {
    const int local = i % rows, token = i / rows, strip = local / kStripRows, r = local % kStripRows;
    if (first_row + local >= p.rows) continue;
    // Row r of token t lies in lane 4 (r % 8) + t % 8 / 2, sum 2 (r / 8) + t % 2 of its tile of 8 tokens.
    const int slot = (token / 8 * 4 + 2 * (r / 8) + token % 2) * kLanes + r % 8 * 4 + token % 8 / 2;
    float sum = 0.f;
    for (int member = 0; member < team; ++member)
      sum += partial[(member * cut.strips + strip) * (kTiles * 4 * kLanes) + slot];
    if (poisoned >> token & 1u) sum = __uint_as_float(0x7fc00000u);  // a dense product meets 0 * Inf
    const int64_t index = static_cast<int64_t>(token) * p.rows + first_row + local;
    if (cut.splits > 1) {
      workspace[blockIdx.y * static_cast<int64_t>(p.tokens) * p.rows + index] = sum;
    } else {
      const float bias = p.bias ? widen(static_cast<const T*>(p.bias)[first_row + local]) : 0.f;
      static_cast<T*>(p.y)[index] = narrow<T>(sum + bias);
    }
  }
}

template <class Tile, class T, int kTiles, int kStages, int kResident>
__global__ __launch_bounds__(most_warps(kTiles) * kLanes, kResident) void strip_linear_kernel(StripWeight w, Product p, Cut cut,
                                                                                     float* workspace) {
  extern __shared__ __align__(16) char shared[];
  __shared__ unsigned long long poisoned;
  char* staged = shared + cut.warps * kStages * cut.stage_bytes;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int strip = blockIdx.x * cut.strips + warp % cut.strips, member = warp / cut.strips;
  const int team = cut.warps / cut.strips;
  const int strips = (p.rows + kStripRows - 1) / kStripRows, columns = (p.cols + kBlockCols - 1) / kBlockCols;
  const int begin = blockIdx.y * cut.blocks;
  const int end = min(columns, begin + cut.blocks), own_end = strip < strips ? end : begin;
  if (threadIdx.x == 0) poisoned = 0;  // the barrier before the first staging makes it visible
  Ring<kStages> ring(w, shared + warp * kStages * cut.stage_bytes, cut.stage_bytes,
                     static_cast<int64_t>(strip) * columns, begin + member, team, own_end);
  float sums[kTiles][4] = {};
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) ring.prefetch(i);
  const char* inputs = staged + lane / 4 * staged_stride(cut.staged) + lane % 4 * 32;
  int i = 0;
  for (int first = begin; first < end; first += cut.staged) {
    __syncthreads();  // nobody reads the columns before any more
    stage_inputs<Tile, T>(p, cut, first, staged, &poisoned);
    __syncthreads();  // the new ones are complete
    const int stop = min(own_end, first + cut.staged);
    for (int block = first + member; block < stop; block += team, ++i) {
      ring.prefetch(i + kStages - 1);
      const char* slot = ring.wait(i);
      Tile::template multiply<T, kTiles>(slot, inputs + (block - first) * (kBlockCols * 2),
                                         8 * staged_stride(cut.staged), p.tokens - lane / 4, sums);
      __syncwarp();  // all lanes have read the slot before it is filled again
    }
  }
  wait_copies<0>();
  __syncthreads();  // rings and columns are free: their memory takes the partial sums
  auto* partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int s = 0; s < 4; ++s) partial[(warp * kTiles * 4 + t * 4 + s) * kLanes + lane] = sums[t][s];
  __syncthreads();  // all warps' sums are there
  finish_strips<T, kTiles>(p, cut, partial, workspace, poisoned);
}

// Decompression: one warp per block writes its part of the rows.
template <class Tile>
__global__ __launch_bounds__(256) void strip_unpack_kernel(StripWeight w, Rows r) {
  const int lane = threadIdx.x % kLanes;
  const int columns = (r.cols + kBlockCols - 1) / kBlockCols;
  const int64_t local = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  if (local >= static_cast<int64_t>((r.rows + kStripRows - 1) / kStripRows) * columns) return;
  const int strip = static_cast<int>(local / columns), block = static_cast<int>(local % columns);
  const int64_t index = static_cast<int64_t>(r.first_row / kStripRows + strip) * columns + block;
  const uint8_t* data = w.stream + (w.offsets ? static_cast<int64_t>(w.offsets[index]) * kUnitBytes
                                              : index * kPairBlockBytes);
  Tile::write(reinterpret_cast<const char*>(data), lane, r, strip * kStripRows, block * kBlockCols);
}

}  // namespace pysparse::cuda
