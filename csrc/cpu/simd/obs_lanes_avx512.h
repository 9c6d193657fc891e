#pragma once
// The sweep of a strip with sixteen rows in the lanes of a register: pruning a weight waits for the
// one before it in its row, and here sixteen rows wait together. Left-looking inside the strip:
// eight columns are brought up to date with the errors on their left, then pruned in registers.
// Include inside an AVX-512 target region.
#include "simd/transpose_avx512.h"

namespace pysparse {
namespace {

constexpr int kLaneRows = 16;
constexpr int kChunk = 8;  // columns held in registers, and a multiple of m where groups choose

// Sixteen rows of a strip, column by column.
struct LaneStrip {
  alignas(64) float weights[kObsDiagonal][kLaneRows];
  alignas(64) float errors[kObsDiagonal][kLaneRows];
  alignas(64) uint32_t gone[kObsDiagonal / 32][kLaneRows];  // a bit a column
};

// The steps of sixteen rows at one column after the other.
class LaneSteps {
 public:
  LaneSteps(const ObsStrip& strip, int64_t first, int rows)
      : grid_(strip.grid),
        lanes_(static_cast<__mmask16>(rows >= kLaneRows ? 0xffff : (1u << rows) - 1)),
        next_(grid_.steps + first * grid_.groups + strip.first / grid_.group_cols),
        left_(grid_.group_cols - strip.first % grid_.group_cols),
        more_(grid_.groups - 1 - strip.first / grid_.group_cols) {
    load();
  }
  __m512 of_next_column() {
    if (left_ == 0) {
      left_ = grid_.group_cols;
      if (more_-- > 0) {  // a chunk may reach beyond the last column
        ++next_;
        load();
      }
    }
    --left_;
    return steps_;
  }

 private:
  void load() {
    alignas(64) float steps[kLaneRows] = {};
    for (int r = 0; r < kLaneRows; ++r)
      if (lanes_ >> r & 1) steps[r] = next_[r * grid_.groups];
    steps_ = _mm512_load_ps(steps);
  }

  ObsGrid grid_;
  __mmask16 lanes_;
  const float* next_;
  int64_t left_, more_;  // columns of this group, and groups after it
  __m512 steps_;
};

// Code times step of the nearest points of the rows' grids; ties to even, at most 127 steps.
inline __m512 on_grid(__m512 w, __m512 step) {
  const __mmask16 live = _mm512_cmp_ps_mask(step, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  const __m512 most = _mm512_set1_ps(127.0f);
  __m512 code = _mm512_maskz_div_ps(live, w, step);
  code = _mm512_max_ps(_mm512_min_ps(code, most), _mm512_sub_ps(_mm512_setzero_ps(), most));
  return _mm512_mul_ps(_mm512_roundscale_ps(code, _MM_FROUND_TO_NEAREST_INT), step);
}

inline void transpose(__m512 (&r)[16]) {
  __m512i words[16];
  for (int i = 0; i < 16; ++i) words[i] = _mm512_castps_si512(r[i]);
  transpose(words);
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(words[i]);
}

inline __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << std::max(count, 0)) - 1);
}
inline uint64_t gone_of(const LaneStrip& lanes, int row) {
  return lanes.gone[0][row] | uint64_t{lanes.gone[1][row]} << 32;
}

inline void load_strip(const ObsStrip& strip, int64_t first, int rows, LaneStrip& lanes) {
  for (int part = 0; part < strip.depth; part += 16) {
    const __mmask16 live = first_lanes(strip.depth - part);
    __m512 block[16];
    for (int r = 0; r < 16; ++r)
      block[r] = r < rows
                     ? _mm512_maskz_loadu_ps(live, strip.panel + (first + r) * strip.stride + part)
                     : _mm512_setzero_ps();
    transpose(block);
    for (int c = 0; c < 16; ++c) _mm512_store_ps(lanes.weights[part + c], block[c]);
  }
  const uint64_t live = strip.depth == 64 ? ~uint64_t{0} : (uint64_t{1} << strip.depth) - 1;
  for (int r = 0; r < 16; ++r) {
    uint64_t gone = 0;
    if (!strip.n && r < rows) {
      const uint8_t* keep = strip.keep + (first + r) * strip.keep_stride;
      gone = _mm512_mask_cmpeq_epi8_mask(live, _mm512_maskz_loadu_epi8(live, keep),
                                         _mm512_setzero_si512());
    }
    lanes.gone[0][r] = static_cast<uint32_t>(gone);
    lanes.gone[1][r] = static_cast<uint32_t>(gone >> 32);
  }
}

// Of the kGroup columns from `c` on: in which rows each is not among the n with the largest scores;
// of equal scores the lower column goes first.
template <int kGroup>
inline void choose_lanes(const __m512* w, const float* scale, int n, __mmask16* gone) {
  __m512 scores[kGroup];
  __m512i before[kGroup];
  const __m512i one = _mm512_set1_epi32(1);
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) {
    scores[i] = _mm512_mul_ps(_mm512_abs_ps(w[i]), _mm512_set1_ps(scale[i]));
    before[i] = _mm512_setzero_si512();
  }
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i)
#pragma GCC unroll 8
    for (int j = i + 1; j < kGroup; ++j) {
      const __mmask16 lower_first = _mm512_cmp_ps_mask(scores[i], scores[j], _CMP_LE_OQ);
      before[j] = _mm512_mask_add_epi32(before[j], lower_first, before[j], one);
      before[i] = _mm512_mask_add_epi32(
          before[i], _mm512_cmp_ps_mask(scores[j], scores[i], _CMP_LT_OQ), before[i], one);
    }
  const __m512i pruned = _mm512_set1_epi32(kGroup - n);
#pragma GCC unroll 8
  for (int i = 0; i < kGroup; ++i) gone[i] = _mm512_cmplt_epi32_mask(before[i], pruned);
}

// Prunes kChunk columns from `c` on in their order. kGroup: columns that choose, 0 where the mask
// is given. With steps, what is kept is rounded to them.
template <int kGroup, bool kGrid>
inline void prune_chunk(const ObsStrip& strip, int c, LaneStrip& lanes, LaneSteps* steps) {
  __m512 w[kChunk];
#pragma GCC unroll 8
  for (int k = 0; k < kChunk; ++k) w[k] = _mm512_load_ps(lanes.weights[c + k]);
  for (int j = 0; j < c; ++j) {
    const __m512 error = _mm512_load_ps(lanes.errors[j]);
    const float* upper = strip.upper + j * kObsDiagonal + c;
#pragma GCC unroll 8
    for (int k = 0; k < kChunk; ++k) w[k] = _mm512_fnmadd_ps(error, _mm512_set1_ps(upper[k]), w[k]);
  }
  uint32_t* words = lanes.gone[c / 32];
  __m512i bits = _mm512_load_si512(words);
  __mmask16 gone[kChunk];
#pragma GCC unroll 8
  for (int k = 0; k < kChunk; ++k) {
    const __m512i bit = _mm512_set1_epi32(static_cast<int>(1u << (c % 32 + k)));
    if constexpr (kGroup == 0) {
      gone[k] = _mm512_test_epi32_mask(bits, bit);
    } else {
      if (k % kGroup == 0) {
        if (c + k + kGroup <= strip.depth) {
          choose_lanes<kGroup>(w + k, strip.scale + c + k, strip.n, gone + k);
        } else {  // a short group at the end of a row stays
          std::fill(gone + k, gone + k + kGroup, __mmask16{0});
        }
      }
      bits = _mm512_mask_or_epi32(bits, gone[k], bits, bit);
    }
    const auto stays = static_cast<__mmask16>(~gone[k]);
    __m512 error, settled;
    if constexpr (kGrid) {
      settled = _mm512_maskz_mov_ps(stays, on_grid(w[k], steps->of_next_column()));
      error = _mm512_mul_ps(_mm512_sub_ps(w[k], settled), _mm512_set1_ps(strip.inverse[c + k]));
    } else {
      settled = _mm512_maskz_mov_ps(stays, w[k]);
      error = _mm512_maskz_mul_ps(gone[k], w[k], _mm512_set1_ps(strip.inverse[c + k]));
    }
    const float* upper = strip.upper + (c + k) * kObsDiagonal + c;
#pragma GCC unroll 8
    for (int i = k + 1; i < kChunk; ++i)
      w[i] = _mm512_fnmadd_ps(error, _mm512_set1_ps(upper[i]), w[i]);
    w[k] = settled;  // exactly
    _mm512_store_ps(lanes.errors[c + k], error);
  }
#pragma GCC unroll 8
  for (int k = 0; k < kChunk; ++k) _mm512_store_ps(lanes.weights[c + k], w[k]);
  _mm512_store_si512(words, bits);
}

inline void store_weights(const ObsStrip& strip, int64_t first, int rows, const LaneStrip& lanes) {
  for (int part = 0; part < strip.depth; part += 16) {
    __m512 block[16];
    for (int c = 0; c < 16; ++c) block[c] = _mm512_load_ps(lanes.weights[part + c]);
    transpose(block);
    const __mmask16 live = first_lanes(strip.depth - part);
    for (int r = 0; r < rows; ++r)
      _mm512_mask_storeu_ps(strip.panel + (first + r) * strip.stride + part, live, block[r]);
  }
}

// The errors of each row, closed up, with their columns; on a grid all of them.
inline void store_errors(const ObsErrors& errors, int64_t first, int rows, int depth, bool grid,
                         const LaneStrip& lanes) {
  int counts[kLaneRows] = {};
  for (int part = 0; part < depth; part += 16) {
    __m512 block[16];
    for (int c = 0; c < 16; ++c) block[c] = _mm512_load_ps(lanes.errors[part + c]);
    transpose(block);
    const __m512i columns =
        _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                         _mm512_set1_epi32(part));
    for (int r = 0; r < rows; ++r) {
      const __mmask16 gone =
          grid ? first_lanes(depth - part) : static_cast<__mmask16>(gone_of(lanes, r) >> part);
      const int found = __builtin_popcount(gone);
      const int64_t at = (first + r) * errors.room + counts[r];
      counts[r] += found;
      // No store beyond the row's own share: the next one may be another thread's.
      _mm512_mask_storeu_ps(errors.values + at, first_lanes(found),
                            _mm512_maskz_compress_ps(gone, block[r]));
      _mm_mask_storeu_epi8(errors.columns + at, first_lanes(found),
                           _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(gone, columns)));
    }
  }
  for (int r = 0; r < rows; ++r) errors.counts[first + r] = static_cast<uint8_t>(counts[r]);
}

inline void store_keep(const ObsStrip& strip, int64_t first, int rows, const LaneStrip& lanes) {
  const uint64_t live = strip.depth == 64 ? ~uint64_t{0} : (uint64_t{1} << strip.depth) - 1;
  for (int r = 0; r < rows; ++r)
    _mm512_mask_storeu_epi8(strip.keep + (first + r) * strip.keep_stride, live,
                            _mm512_maskz_set1_epi8(~gone_of(lanes, r), 1));
}

template <int kGroup, bool kGrid>
void sweep_lanes(const ObsStrip& strip, const ObsErrors& errors, int64_t begin, int64_t end) {
  LaneStrip lanes;
  for (int64_t first = begin; first < end; first += kLaneRows) {
    const int rows = static_cast<int>(std::min<int64_t>(kLaneRows, end - first));
    load_strip(strip, first, rows, lanes);
    if constexpr (kGrid) {
      LaneSteps steps(strip, first, rows);
      for (int c = 0; c < strip.depth; c += kChunk)
        prune_chunk<kGroup, true>(strip, c, lanes, &steps);
    } else {
      for (int c = 0; c < strip.depth; c += kChunk)
        prune_chunk<kGroup, false>(strip, c, lanes, nullptr);
    }
    store_weights(strip, first, rows, lanes);
    store_errors(errors, first, rows, strip.depth, kGrid, lanes);
    if (kGroup) store_keep(strip, first, rows, lanes);
  }
}

}  // namespace
}  // namespace pysparse
