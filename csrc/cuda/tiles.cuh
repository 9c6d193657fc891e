#pragma once
// What a block of 16 x 64 weights looks like in memory, and how a warp multiplies by it or writes
// it out.
#include "pipe.cuh"

namespace pysparse::cuda {

// A bitmap in the order of tensor-core operands (device_layout.h): 32 mask words, then the values
// by product, half of its elements, lane, element. Lane ranks come from byte-wide counters, four
// scans in one register, and no population count.
struct FragmentTile {
  static constexpr int kMostUnits = (kHeaderBytes + 2 * kStripRows * kBlockCols) / kUnitBytes;
  static constexpr bool kSkipsZeros =
      false;  // zeros are multiplied, so Inf and NaN spread as in a dense product
  __device__ static constexpr int input_word(int w) { return fragment_input_word(w); }

  // A lane's mask and where its first value for each half of the four products is.
  struct Ranks {
    uint32_t mask;
    HalfPlace first[4][2];
  };

  __device__ static __forceinline__ int byte_of(uint32_t word, int q) {
    return static_cast<int>(word >> 8 * q & 255u);
  }

  __device__ static __forceinline__ Ranks ranks(const char* block, int lane) {
    Ranks r;
    r.mask = reinterpret_cast<const uint32_t*>(block)[lane];
    uint32_t count = r.mask - (r.mask >> 1 & 0x55555555u);
    count = (count & 0x33333333u) + (count >> 2 & 0x33333333u);
    const uint32_t counts[2] = {count & 0x0f0f0f0fu, count >> 4 & 0x0f0f0f0fu};
    uint32_t before[2], totals[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Four counters at once: 32 lanes hold at most 128, so no byte carries into the next.
      const uint32_t sums = lane_sums(counts[half]);
      totals[half] = __shfl_sync(kFullWarp, sums, kLanes - 1);
      before[half] = sums - counts[half];
    }
    HalfPlace next = half_place(block + kHeaderBytes);
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        r.first[q][half] = halves_on(next, byte_of(before[half], q));
        next = halves_on(next, byte_of(totals[half], q));
      }
    return r;
  }

  // The A operand of product q: present values in order, zeros between them.
  __device__ static __forceinline__ void expand(const Ranks& r, int q, uint32_t (&a)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      HalfPlace next = r.first[q][half];
#pragma unroll
      for (int pair = 2 * half; pair < 2 * half + 2; ++pair) {
        const uint32_t low = take_if(next, r.mask & 1u << (8 * q + 2 * pair));
        const uint32_t high = take_if(next, r.mask & 2u << (8 * q + 2 * pair));
        a[pair] = __byte_perm(low, high, 0x5410);
      }
    }
  }

  // inputs + tokens[t]: the lane's 32 bytes of one token of the t-th tile of 8. What lies there for
  // a tile's missing tokens does not matter: a token's inputs reach its own sums only, and those
  // are not written.
  template <class T, int kTiles>
  __device__ static __forceinline__ void multiply(const char* block, const char* inputs,
                                                  const int (&tokens)[kTiles],
                                                  float (&sums)[kTiles][4]) {
    const Ranks r = ranks(block, static_cast<int>(threadIdx.x) % kLanes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
      expand(r, 2 * half, a[0]);
      expand(r, 2 * half + 1, a[1]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint4 b = *reinterpret_cast<const uint4*>(inputs + tokens[t] + 16 * half);
        mma<T>(sums[t], a[0], b.x, b.y);
        mma<T>(sums[t], a[1], b.z, b.w);
      }
    }
  }

  __device__ static __forceinline__ void write(const char* block, int lane, const Rows& rows,
                                               int first_row, int first_col) {
    const Ranks r = ranks(block, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[2][4];
      expand(r, 2 * half, a[0]);
      expand(r, 2 * half + 1, a[1]);
      const int col = first_col + 16 * (lane % 4) + 8 * half;
#pragma unroll
      for (int below = 0; below < 2; ++below) {
        const int row = first_row + lane / 4 + 8 * below;
        const uint32_t words[4] = {a[0][below], a[0][2 + below], a[1][below], a[1][2 + below]};
        if (row < rows.rows) write_columns<4>(rows, row, col, words);
      }
    }
  }

  // Writes 2 * kWords neighbouring values of a row, in one store where the row's pitch allows it.
  template <int kWords>
  __device__ static __forceinline__ void write_columns(const Rows& rows, int row, int col,
                                                       const uint32_t (&words)[kWords]) {
    auto* target = static_cast<uint16_t*>(rows.dense) + static_cast<int64_t>(row) * rows.cols + col;
    if (rows.cols % 8 == 0) {
      if (col >= rows.cols) return;
      if constexpr (kWords == 4)
        *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
      else
        *reinterpret_cast<uint2*>(target) = make_uint2(words[0], words[1]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 2 * kWords; ++i)
      if (col + i < rows.cols) target[i] = static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2));
  }
};

// Two of four: 32 metadata words, then the compressed A operands of two mma.sp.m16n8k32. Nothing to
// decode.
struct PairTile {
  static constexpr int kMostUnits = kPairBlockBytes / kUnitBytes;
  static constexpr bool kSkipsZeros =
      true;  // the hardware never reads inputs under a zero: Inf must be looked for
  __device__ static constexpr int input_word(int w) { return pair_input_word(w); }

  __device__ static __forceinline__ uint4 operand(const char* block, int m, int lane) {
    return reinterpret_cast<const uint4*>(block + kHeaderBytes)[m * kLanes + lane];
  }

  template <class T, int kTiles>
  __device__ static __forceinline__ void multiply(const char* block, const char* inputs,
                                                  const int (&tokens)[kTiles],
                                                  float (&sums)[kTiles][4]) {
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const uint32_t metadata = reinterpret_cast<const uint32_t*>(block)[lane];
    const uint4 a0 = operand(block, 0, lane), a1 = operand(block, 1, lane);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint4 b0 = *reinterpret_cast<const uint4*>(inputs + tokens[t]);
      const uint4 b1 = *reinterpret_cast<const uint4*>(inputs + tokens[t] + 16);
      mma_sparse<T, 0>(sums[t], a0, b0, metadata);
      mma_sparse<T, 1>(sums[t], a1, b1, metadata);
    }
  }

  __device__ static __forceinline__ void write(const char* block, int lane, const Rows& rows,
                                               int first_row, int first_col) {
    const auto* metadata = reinterpret_cast<const uint32_t*>(block);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const uint4 a = operand(block, m, lane);
      const uint32_t pairs[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = operand_row(lane, 2 * i), group = pair_group(lane, 2 * i);
        const uint32_t code = metadata[pair_meta_lane(m, row, group)] >> pair_meta_bit(row, group);
        const uint32_t halves[2] = {pairs[i] & 0xffffu, pairs[i] >> 16};
        uint32_t words[2] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t at = code >> 2 * h & 3u, value = halves[h] == kFiller ? 0u : halves[h];
          words[0] |= at < 2 ? value << 16 * (at & 1u) : 0u;
          words[1] |= at < 2 ? 0u : value << 16 * (at & 1u);
        }
        if (first_row + row < rows.rows)
          FragmentTile::write_columns<2>(rows, first_row + row,
                                         first_col + pair_group_col(m, group), words);
      }
    }
  }
};

}  // namespace pysparse::cuda
