#pragma once
// Flash attention for a tile of queries of one head over chosen keys, on the tensor cores (sm_80
// on). Four warps take 16 or 32 query rows each and pass over the keys in tiles of 64. One buffer
// for keys and one for values take turns: values arrive while scores are computed, the next keys
// while the softmax and the second product run.
#include "attention.h"
#include "attention_tile.cuh"

namespace pysparse::cuda {

constexpr int kAttentionWarps = 4, kAttentionThreads = kAttentionWarps * kLanes;
constexpr int kTileKeys = 64;
constexpr float kLog2E = 1.4426950408889634f;

// 32 rows a warp halve the reading of shared memory; with 256 dimensions the sums of 16 fill the
// registers.
PYSPARSE_HD constexpr int row_tiles(int dim) { return dim <= 128 ? 2 : 1; }
PYSPARSE_HD constexpr int tile_queries(int dim) { return kAttentionWarps * 16 * row_tiles(dim); }
PYSPARSE_HD constexpr int attention_shared(int dim) {
  return (tile_queries(dim) + 2 * kTileKeys) * dim * 2 + 2 * kTileKeys * 4;
}

// Where a tile of queries stands in its sequence.
struct TileRows {
  int batch, head;
  int start, end;  // the sequence's keys
  int position;  // of the tile's first row, from `start` on; below 0: rows in front of the sequence
  int last;      // position of its last query
};

// The keys of one tile of queries, as tiles of 64 of them.
template <KeySet kSet>
class KeyTiles {
 public:
  __device__ KeyTiles(const AttentionProblem& p, const KeyChoice& c, const TileRows& rows,
                      int32_t* slots)
      : slots_(slots), low_(rows.start) {
    high_ = p.causal ? min(rows.end, rows.start + rows.last + 1) : rows.end;
    const int group = c.group ? max(rows.position, 0) / c.group : 0;
    if constexpr (kSet == KeySet::kSpans) {
      head_end_ = c.group ? min(low_ + c.head_keys, high_) : low_;
      local_ = max(head_end_, c.group ? low_ + group * c.group - c.extra_keys : low_);
      head_tiles_ = max(0, head_end_ - low_ + kTileKeys - 1) / kTileKeys;
      count_ = head_tiles_ + max(0, high_ - local_ + kTileKeys - 1) / kTileKeys;
    } else {
      const int list_head = rows.head / (p.heads / c.list_heads);
      const int64_t row =
          (static_cast<int64_t>(rows.batch) * c.list_heads + list_head) * c.groups + group;
      const int64_t begin = __ldg(c.offsets + row);
      list_ = c.indices + begin;
      listed_ = static_cast<int>(__ldg(c.offsets + row + 1) - begin);
      if constexpr (kSet == KeySet::kStripes) {
        count_ = (listed_ + kTileKeys - 1) / kTileKeys;
        if (static_cast<int>(threadIdx.x) < kTileKeys) {
          slots_[threadIdx.x] = listed_key(threadIdx.x);
          next_ = listed_key(kTileKeys + threadIdx.x);
        }
        __syncthreads();
      } else {
        block_ = c.block;
        per_block_ = c.block / kTileKeys;
        count_ = listed_ * per_block_;
        next_ = block_key(0);
      }
    }
  }

  __device__ __forceinline__ int count() const { return count_; }

  // Makes tile `t` the one that key() speaks of; tiles come in order.
  __device__ __forceinline__ void enter(int t) {
    if constexpr (kSet == KeySet::kSpans) {
      const bool head = t < head_tiles_;
      first_ = head ? low_ + t * kTileKeys : local_ + (t - head_tiles_) * kTileKeys;
      end_ = head ? head_end_ : high_;
    } else if constexpr (kSet == KeySet::kBlocks) {
      first_ = next_;
      end_ = high_;
      next_ = block_key(t + 1);
    } else {
      slot_ = slots_ + t % 2 * kTileKeys;
    }
  }
  // Between the barriers that end the use of tile t - 1 and begin that of tile t + 1.
  __device__ __forceinline__ void look_ahead(int t) {
    if constexpr (kSet == KeySet::kStripes)
      if (static_cast<int>(threadIdx.x) < kTileKeys) {
        slots_[(t + 1) % 2 * kTileKeys + threadIdx.x] = next_;
        next_ = listed_key((t + 2) * kTileKeys + threadIdx.x);
      }
  }
  // The key of a row of the tile, -1 for none.
  __device__ __forceinline__ int key(int row) const {
    if constexpr (kSet == KeySet::kStripes) {
      return slot_[row];
    } else {
      const int at = first_ + row;
      return at < end_ ? at : -1;
    }
  }
  // True when every row of the tile holds a key, none of them after key `first`.
  __device__ __forceinline__ bool whole(int t, int first) const {
    if constexpr (kSet == KeySet::kStripes)
      return (t + 1) * kTileKeys <= listed_ && first >= 0;
    else
      return first_ + kTileKeys <= min(end_, first + 1);
  }

 private:
  __device__ __forceinline__ int listed_key(int i) const {
    return i < listed_ ? __ldg(list_ + i) : -1;
  }
  __device__ __forceinline__ int block_key(int t) const {
    const int i = t / per_block_;
    return i < listed_ ? low_ + __ldg(list_ + i) * block_ + t % per_block_ * kTileKeys : low_;
  }

  int32_t* slots_;
  const int32_t* slot_ = nullptr;
  const int32_t* list_ = nullptr;
  int low_, high_, count_ = 0, listed_ = 0, next_ = -1;
  int head_end_ = 0, local_ = 0, head_tiles_ = 0, first_ = 0, end_ = 0, block_ = 0, per_block_ = 1;
};

// Starts the copy of a tile of keys or values.
template <int kDim, KeySet kSet>
__device__ __forceinline__ void stage_keys(char* tile, const uint16_t* rows, int64_t stride,
                                           const KeyTiles<kSet>& keys) {
  constexpr int kUnits = kDim / 8;
#pragma unroll 2
  for (int i = 0; i < kTileKeys * kUnits / kAttentionThreads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kAttentionThreads, row = at / kUnits,
              unit = at % kUnits;
    const int key = keys.key(row);
    copy_unit_or_zero(tile + unit_place<kDim>(row, unit),
                      rows + static_cast<int64_t>(max(key, 0)) * stride + 8 * unit, key >= 0);
  }
  commit_copies();
}

// One warp's part of the softmax: rows lane / 4 and lane / 4 + 8 of each of its row tiles.
template <class T, int kDim, int kRowTiles>
struct WarpRows {
  static constexpr int kKeyParts = kTileKeys / 8, kDimParts = kDim / 8;
  float sums[kRowTiles][kDimParts][4];
  float scores[kRowTiles][kKeyParts][4];
  uint32_t weights[kRowTiles][kKeyParts][2];  // of the softmax, pairs of 16 bits
  float max[kRowTiles][2], denominator[kRowTiles][2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int d = 0; d < kDimParts; ++d)
#pragma unroll
        for (int s = 0; s < 4; ++s) sums[r][d][s] = 0.f;
#pragma unroll
      for (int h = 0; h < 2; ++h) max[r][h] = -INFINITY, denominator[r][h] = 0.f;
    }
  }

  // scores = Q K^T for the warp's rows; both tiles are in shared memory.
  __device__ __forceinline__ void score(const char* queries, const char* keys, int first_row) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int j = 0; j < kKeyParts; ++j)
#pragma unroll
        for (int s = 0; s < 4; ++s) scores[r][j][s] = 0.f;
#pragma unroll 2
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r)
        load_matrices(
            a[r], queries + unit_place<kDim>(first_row + 16 * r + lane % 16, 2 * step + lane / 16));
#pragma unroll
      for (int j = 0; j < kKeyParts; j += 2) {
        uint32_t b[4];
        load_matrices(
            b, keys + unit_place<kDim>(8 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          mma<T>(scores[r][j], a[r], b[0], b[1]);
          mma<T>(scores[r][j + 1], a[r], b[2], b[3]);
        }
      }
    }
  }

  // Scores that a query must not see become -inf: rows without a key, and keys after limit[.][.].
  template <KeySet kSet>
  __device__ __forceinline__ void mask(const KeyTiles<kSet>& tile,
                                       const int (&limit)[kRowTiles][2]) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int j = 0; j < kKeyParts; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int key = tile.key(8 * j + 2 * (lane % 4) + c);
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            if (key < 0 || key > limit[r][h]) scores[r][j][2 * h + c] = -INFINITY;
      }
  }

  // Scores to weights 2^(scale score - max); earlier sums are brought to the new maximum.
  __device__ __forceinline__ void soften(float scale) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = -INFINITY;
#pragma unroll
        for (int j = 0; j < kKeyParts; ++j)
          top = fmaxf(top, fmaxf(scores[r][j][2 * h], scores[r][j][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, 2));
        const float highest = fmaxf(max[r][h], top * scale);
        const float base = highest == -INFINITY ? 0.f : highest;  // no key yet: nothing to scale
        const float shrink = exp2_fast(max[r][h] - base);
        max[r][h] = highest;
        denominator[r][h] *= shrink;
#pragma unroll
        for (int d = 0; d < kDimParts; ++d)
          sums[r][d][2 * h] *= shrink, sums[r][d][2 * h + 1] *= shrink;
#pragma unroll
        for (int j = 0; j < kKeyParts; ++j) {
          const float first = exp2_fast(fmaf(scores[r][j][2 * h], scale, -base));
          const float second = exp2_fast(fmaf(scores[r][j][2 * h + 1], scale, -base));
          denominator[r][h] += first + second;  // this lane's share; the quad adds up at the end
          weights[r][j][h] = pack(first, second);
        }
      }
  }

  // sums += P V.
  __device__ __forceinline__ void accumulate(const char* values) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int j = 0; j < kKeyParts; j += 2) {
#pragma unroll
      for (int d = 0; d < kDimParts; d += 2) {
        uint32_t b[4];
        load_transposed(b, values + unit_place<kDim>(8 * j + lane % 16, d + lane / 16));
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          // Scores of two parts of 8 keys lie in the lanes as the first operand's 16 columns do.
          const uint32_t a[4] = {weights[r][j][0], weights[r][j][1], weights[r][j + 1][0],
                                 weights[r][j + 1][1]};
          mma<T>(sums[r][d], a, b[0], b[1]);
          mma<T>(sums[r][d + 1], a, b[2], b[3]);
        }
      }
    }
  }

  __device__ static __forceinline__ uint32_t pack(float low, float high) {
    const T both[2] = {narrow<T>(low), narrow<T>(high)};
    uint32_t word;
    memcpy(&word, both, 4);
    return word;
  }

  // Takes up a state where an earlier call left it; its denominator goes to one lane of the quad.
  __device__ __forceinline__ void resume(const SoftmaxState& state, int64_t first, int r, int h) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const float total = state.denominator[first];
    max[r][h] = state.max[first] * kLog2E;
    denominator[r][h] = lane % 4 == 0 ? total : 0.f;
    const float* row = state.mean + first * kDim + 2 * (lane % 4);
#pragma unroll
    for (int d = 0; d < kDimParts; ++d)
      sums[r][d][2 * h] = row[8 * d] * total, sums[r][d][2 * h + 1] = row[8 * d + 1] * total;
  }

  // Writes one row: the result, its log-sum-exp, the state, whichever is wanted.
  __device__ __forceinline__ void finish(const AttentionProblem& p, int batch, int head, int query,
                                         int r, int h) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int64_t first = (static_cast<int64_t>(batch) * p.heads + head) * p.queries + query;
    const float total = denominator[r][h], top = max[r][h] / kLog2E;
    const float share = total == 0.f ? 0.f : 1.f / total;  // a row without keys is zero
    if (p.out) {
      auto* row = static_cast<uint16_t*>(p.out) + batch * p.out_batch + head * p.out_head +
                  query * p.out_row + 2 * (lane % 4);
#pragma unroll
      for (int d = 0; d < kDimParts; ++d)
        *reinterpret_cast<uint32_t*>(row + 8 * d) =
            pack(sums[r][d][2 * h] * share, sums[r][d][2 * h + 1] * share);
    }
    if (p.after.mean) {
      float* row = p.after.mean + first * kDim + 2 * (lane % 4);
#pragma unroll
      for (int d = 0; d < kDimParts; ++d)
        row[8 * d] = sums[r][d][2 * h] * share, row[8 * d + 1] = sums[r][d][2 * h + 1] * share;
    }
    if (lane % 4) return;
    if (p.after.max) p.after.max[first] = top, p.after.denominator[first] = total;
    if (p.lse) p.lse[first] = total == 0.f ? -INFINITY : top + logf(total);
  }
};

template <class T, int kDim, KeySet kSet>
__global__ __launch_bounds__(kAttentionThreads, 2) void attention_kernel(AttentionProblem p,
                                                                         KeyChoice choice) {
  constexpr int kRowTiles = row_tiles(kDim), kQueries = tile_queries(kDim);
  extern __shared__ __align__(16) char shared[];
  char* queries = shared;
  char* key_tile = queries + kQueries * kDim * 2;
  char* value_tile = key_tile + kTileKeys * kDim * 2;
  auto* slots = reinterpret_cast<int32_t*>(value_tile + kTileKeys * kDim * 2);

  // Tiles start at multiples of their size in the sequence, so none lies in two groups. The last
  // tiles have most keys and go first.
  const int tile = static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x);
  const int head = static_cast<int>(blockIdx.y), batch = static_cast<int>(blockIdx.z);
  const int start = p.first_key ? __ldg(p.first_key + batch) : 0;
  const int end = p.end_key ? __ldg(p.end_key + batch) : p.keys;
  const int before = p.offset - start;  // position of query 0
  const int position =
      (before >= 0 ? before / kQueries : -((kQueries - 1 - before) / kQueries)) * kQueries +
      tile * kQueries;
  const int first_query = position - before;  // below 0: rows before the first query
  const int end_query = min(p.queries, first_query + kQueries);
  if (first_query >= p.queries) return;
  const int lane = static_cast<int>(threadIdx.x) % kLanes,
            warp = static_cast<int>(threadIdx.x) / kLanes;
  const int warp_row = warp * 16 * kRowTiles;

  const auto head_of = [&](const HeadRows& x, int which) {
    return static_cast<const uint16_t*>(x.data) + batch * x.batch + which * x.head;
  };
  const int kv_head = head / (p.heads / p.kv_heads);
  const uint16_t* q = head_of(p.q, head);
  const uint16_t* k = head_of(p.k, kv_head);
  const uint16_t* v = head_of(p.v, kv_head);

  constexpr int kUnits = kDim / 8;
#pragma unroll 4
  for (int at = threadIdx.x; at < kQueries * kUnits; at += kAttentionThreads) {
    const int row = at / kUnits, unit = at % kUnits, query = first_query + row;
    const bool present = query >= 0 && query < end_query;
    copy_unit_or_zero(queries + unit_place<kDim>(row, unit),
                      q + static_cast<int64_t>(present ? query : 0) * p.q.row + 8 * unit, present);
  }
  commit_copies();

  const TileRows tile_rows{batch, head, start, end, position, before + end_query - 1};
  KeyTiles<kSet> keys(p, choice, tile_rows, slots);
  WarpRows<T, kDim, kRowTiles> rows;
  rows.clear();
  int limit[kRowTiles][2];  // the last key that a row sees
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + 16 * r + 8 * h + lane / 4, query = first_query + row;
      const int key = start + position + row;
      limit[r][h] = !p.causal ? p.keys : key >= start && key < end ? key : -1;
      if (p.before.mean && query >= 0 && query < end_query)
        rows.resume(p.before, (static_cast<int64_t>(batch) * p.heads + head) * p.queries + query, r,
                    h);
    }
  // Keys up to this one are seen by all rows of the tile, if all of them are inside the sequence.
  const int seen_by_all = !p.causal                                             ? p.keys
                          : position >= 0 && position + kQueries <= end - start ? start + position
                                                                                : -1;

  const float scale = p.scale * kLog2E;
  const int count = keys.count();
  if (count) {
    keys.enter(0);
    stage_keys<kDim>(key_tile, k, p.k.row, keys);
  }
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    wait_copies<0>();
    __syncthreads();  // the keys have landed, and no warp reads the values before them any more
    stage_keys<kDim>(value_tile, v, p.v.row, keys);
    keys.look_ahead(t);
    rows.score(queries, key_tile, warp_row);
    if (!keys.whole(t, seen_by_all)) rows.mask(keys, limit);
    wait_copies<0>();
    __syncthreads();  // the values have landed, and the keys may go
    rows.soften(scale);
    if (t + 1 < count) {
      keys.enter(t + 1);
      stage_keys<kDim>(key_tile, k, p.k.row, keys);
    }
    rows.accumulate(value_tile);
  }
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float& total = rows.denominator[r][h];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      const int query = first_query + warp_row + 16 * r + 8 * h + lane / 4;
      if (query >= 0 && query < end_query) rows.finish(p, batch, head, query, r, h);
    }
}

}  // namespace pysparse::cuda
