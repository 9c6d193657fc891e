#pragma once
// y = x W^T for weights in blocks of 16 rows x 64 columns, on the tensor cores, for 1 to 64 tokens.
// Thread blocks stay and take strip after strip. Each warp streams its blocks through its own ring
// in shared memory, without a break from strip to strip; the warps of a strip share its columns and
// add up at its end. What a block looks like is the tile object's business: FragmentTile, PairTile.
#include <type_traits>

#include "launch.cuh"
#include "pipe.cuh"

namespace pysparse::cuda {

constexpr int kMostWarps = 16;      // per thread block
constexpr int kMostTokens = 64;     // beyond, unpacking and a dense product do better
constexpr int kPartialStride = 20;  // floats of a warp's 16 sums per token; the 4 turn the banks

// How a launch is cut: the host decides, the kernel follows.
struct Cut {
  int warps, strips;  // per thread block; warps / strips of them share a strip
  int splits;         // parts of the columns over thread blocks; above 1, sums go to the workspace
  int blocks;         // blocks of 64 columns per part
  int staged;         // blocks of 64 columns of x that are in shared memory at a time
  int stage_bytes;    // one slot of a warp's ring
};

PYSPARSE_HD constexpr int staged_stride(int staged) {
  return staged * kBlockCols * 2 + 16;
}  // bytes; the 16 turn the banks
// Two buffers take turns where they are small: who writes one has passed the barrier after its last
// reading.
PYSPARSE_HD constexpr int partial_buffers(int tiles) { return tiles == 1 ? 2 : 1; }
PYSPARSE_HD constexpr int partial_bytes(int warps, int tokens) {
  return warps * tokens * kPartialStride * 4;
}

// The blocks that a warp takes: `each` of every strip it visits, `step` apart, `count` in all.
// Blocks count by strips; the first of one strip and of the next strip are strip_step apart.
struct Walk {
  int first, step, each, strip_step, count;
};

// Brings a warp's blocks to shared memory, some ahead of their use. `walk` is in shared memory: it
// is looked at once in 32 blocks, and registers are scarce. A block has at most kMostUnits units.
template <int kStages, int kMostUnits>
class Ring {
 public:
  __device__ Ring(const StripWeight& w, char* slots, int slot_bytes, const Walk* walk)
      : stream_(w.stream),
        offsets_(w.offsets),
        slots_(slots),
        slot_bytes_(slot_bytes),
        walk_(walk) {}

  // Starts the copy of the i-th block; calls must be in order. Always commits a group, so waits can
  // count.
  __device__ __forceinline__ void prefetch(int i) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int turn = static_cast<int>(static_cast<unsigned>(i) % kLanes);
    if (turn == 0) look_up(i + lane);
    const int begin = __shfl_sync(kFullWarp, begin_, turn),
              units = __shfl_sync(kFullWarp, units_, turn);
    const uint8_t* source = stream_ + (static_cast<int64_t>(begin) + lane) * kUnitBytes;
    char* slot = slots_ + fill_ + lane * kUnitBytes;
    copy<0>(units - lane, slot, source);
    commit_copies();
    fill_ = after(fill_);
  }
  // The next block, when it is there; calls come as those of prefetch did.
  __device__ __forceinline__ const char* wait() {
    wait_copies<kStages - 1>();
    __syncwarp();  // every lane's copies have landed, not only this one's
    const char* slot = slots_ + use_;
    use_ = after(use_);
    return slot;
  }

 private:
  // Copies the lane's units, one in kLanes; `left`: those of the block from its first one on.
  template <int kRound>
  static __device__ __forceinline__ void copy(int left, char* slot, const uint8_t* source) {
    copy_unit_if<kRound * kLanes * kUnitBytes>(left > kRound * kLanes, slot, source);
    if constexpr ((kRound + 1) * kLanes < kMostUnits) copy<kRound + 1>(left, slot, source);
  }
  // Finds the place of the i-th block: 32 at a time, one per lane.
  __device__ __forceinline__ void look_up(int i) {
    begin_ = units_ = 0;
    if (i >= walk_->count) return;
    const int turn = i / walk_->each;
    const int64_t block = walk_->first + static_cast<int64_t>(turn) * walk_->strip_step +
                          (i - turn * walk_->each) * walk_->step;
    if (offsets_) {
      begin_ = __ldg(offsets_ + block);
      units_ = __ldg(offsets_ + block + 1) - begin_;
    } else {
      units_ = kPairBlockBytes / kUnitBytes;
      begin_ = static_cast<int>(block * units_);
    }
  }

  __device__ __forceinline__ int after(int slot) const {
    return slot + slot_bytes_ == kStages * slot_bytes_ ? 0 : slot + slot_bytes_;
  }

  const uint8_t* stream_;
  const int32_t* offsets_;
  char* slots_;
  int slot_bytes_, fill_ = 0, use_ = 0;  // bytes
  const Walk* walk_;
  int begin_ = 0, units_ = 0;
};

// Copies columns [64 first, 64 (first + staged)) of all tokens to shared memory, in the tile's
// order of words and with zeros past the last column. Marks tokens that hold Inf or NaN where the
// tile asks for it.
template <class Tile, class T>
__device__ void stage_inputs(const Product& p, const Cut& cut, int first, char* staged,
                             unsigned* poisoned) {
  const int vectors = cut.staged * (kBlockCols / 8), stride = staged_stride(cut.staged);
  for (int i = threadIdx.x; i < vectors * p.tokens; i += blockDim.x) {
    const int token = i / vectors, v = i % vectors, col = first * kBlockCols + 8 * v;
    const auto* source =
        static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(token) * p.cols + col;
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
    for (int h = 0; h < 4; ++h)
      *reinterpret_cast<uint32_t*>(target + 4 * Tile::input_word(v % 8 * 4 + h)) = words[h];
    if constexpr (Tile::kSkipsZeros)
      if (any_not_finite<T>(words[0]) || any_not_finite<T>(words[1]) ||
          any_not_finite<T>(words[2]) || any_not_finite<T>(words[3]))
        atomicOr(poisoned + token / 32, 1u << token % 32);
  }
}

// Puts a warp's sums of its strip where finish_strips looks for them.
template <int kTiles>
__device__ __forceinline__ void hand_over(float* partial, int tokens,
                                          const float (&sums)[kTiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes,
            warp = static_cast<int>(threadIdx.x) / kLanes;
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      const int token = 8 * t + 2 * (lane % 4) + s % 2, row = lane / 4 + 8 * (s / 2);
      if (token < tokens) partial[(warp * tokens + token) * kPartialStride + row] = sums[t][s];
    }
}

// Adds up the warps of each strip in a fixed order and writes results, or this part's sums to the
// workspace.
template <class T>
__device__ void finish_strips(const Product& p, const Cut& cut, int group, const float* partial,
                              float* workspace, const unsigned* poisoned) {
  const int rows = cut.strips * kStripRows, first_row = group * rows;
  for (int i = threadIdx.x; i < rows * p.tokens; i += blockDim.x) {
    const int local = i % rows, token = i / rows, strip = local / kStripRows,
              r = local % kStripRows;
    if (first_row + local >= p.rows) continue;
    float sum = 0.f;
    for (int warp = strip; warp < cut.warps; warp += cut.strips)
      sum += partial[(warp * p.tokens + token) * kPartialStride + r];
    if (poisoned[token / 32] >> token % 32 & 1u)
      sum = __uint_as_float(0x7fc00000u);  // a dense product meets 0 * Inf
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
__global__ __launch_bounds__(kMostWarps* kLanes,
                             kResident) void strip_linear_kernel(StripWeight w, Product p, Cut cut,
                                                                 float* workspace) {
  extern __shared__ __align__(16) char shared[];
  __shared__ unsigned poisoned[kMostTokens / 32];  // a bit for each token
  __shared__ Walk walks[kMostWarps];
  char* staged = shared + cut.warps * kStages * cut.stage_bytes;
  char* partial = staged + p.tokens * staged_stride(cut.staged);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int member = warp / cut.strips, team = cut.warps / cut.strips;
  const int strips = (p.rows + kStripRows - 1) / kStripRows,
            columns = (p.cols + kBlockCols - 1) / kBlockCols;
  const int begin = blockIdx.y * cut.blocks, end = min(columns, begin + cut.blocks);
  if (threadIdx.x < kMostTokens / 32)
    poisoned[threadIdx.x] = 0;  // the barrier before the first staging makes it visible
  const int strip = blockIdx.x * cut.strips + warp % cut.strips,
            strip_step = gridDim.x * cut.strips;
  const int each = max(0, (end - begin - member + team - 1) / team);
  const int visits = max(0, (strips - strip + strip_step - 1) / strip_step);
  if (lane == 0)
    walks[warp] = {strip * columns + begin + member, team, each, strip_step * columns,
                   each * visits};
  __syncwarp();  // all lanes see it
  Ring<kStages, Tile::kMostUnits> ring(w, shared + warp * kStages * cut.stage_bytes,
                                       cut.stage_bytes, walks + warp);
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) ring.prefetch(i);
  wait_for_inputs();
  const char* inputs = staged + lane % 4 * 32;
  int tokens[kTiles];  // missing ones of the last tile repeat the last one
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
    tokens[t] = min(8 * t + lane / 4, p.tokens - 1) * staged_stride(cut.staged);
  const bool once = cut.staged >= end - begin;  // all inputs of the part fit at once
  int i = 0;
  for (int group = blockIdx.x; group * cut.strips < strips; group += gridDim.x) {
    const int own_end = group * cut.strips + warp % cut.strips < strips ? end : begin;
    float sums[kTiles][4] = {};
    for (int first = begin; first < end; first += cut.staged) {
      if (group == static_cast<int>(blockIdx.x) || !once) {
        __syncthreads();  // nobody reads the columns before any more
        stage_inputs<Tile, T>(p, cut, first, staged, poisoned);
        __syncthreads();  // the new ones are complete
      }
      const int stop = min(own_end, first + cut.staged);
      for (int block = first + member; block < stop; block += team, ++i) {
        ring.prefetch(i + kStages - 1);
        const char* slot = ring.wait();
        Tile::template multiply<T, kTiles>(slot, inputs + (block - first) * (kBlockCols * 2),
                                           tokens, sums);
        __syncwarp();  // all lanes have read the slot before it is filled again
      }
    }
    const int side = static_cast<int>(group / gridDim.x) % partial_buffers(kTiles);
    auto* sums_of_warps =
        reinterpret_cast<float*>(partial + side * partial_bytes(cut.warps, p.tokens));
    hand_over(sums_of_warps, p.tokens, sums);
    __syncthreads();  // all warps' sums are there
    finish_strips<T>(p, cut, group, sums_of_warps, workspace, poisoned);
    if constexpr (partial_buffers(kTiles) == 1)
      __syncthreads();  // and read, before the next ones overwrite them
  }
}

constexpr int kUnpackWarps = 8;

// Decompression: one warp per block brings it to shared memory and writes its part of the rows.
template <class Tile>
__global__ __launch_bounds__(kUnpackWarps* kLanes) void strip_unpack_kernel(StripWeight w, Rows r) {
  __shared__ uint4 slots[kUnpackWarps][Tile::kMostUnits];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int columns = (r.cols + kBlockCols - 1) / kBlockCols;
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kUnpackWarps + warp;
  if (local >= static_cast<int64_t>((r.rows + kStripRows - 1) / kStripRows) * columns)
    return;  // the whole warp leaves
  const int strip = static_cast<int>(local / columns), block = static_cast<int>(local % columns);
  const int64_t index = static_cast<int64_t>(r.first_row / kStripRows + strip) * columns + block;
  constexpr int kPairUnits = kPairBlockBytes / kUnitBytes;
  const int64_t begin = w.offsets ? w.offsets[index] : index * kPairUnits;
  const int units = w.offsets ? static_cast<int>(w.offsets[index + 1] - begin) : kPairUnits;
  const auto* source = reinterpret_cast<const uint4*>(w.stream) + begin;
  for (int u = lane; u < units; u += kLanes) slots[warp][u] = __ldcs(source + u);
  __syncwarp();  // the block is complete
  Tile::write(reinterpret_cast<const char*>(slots[warp]), lane, r, strip * kStripRows,
              block * kBlockCols);
}

}  // namespace pysparse::cuda
