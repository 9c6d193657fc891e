#pragma once
// 64 columns of int8 values become floats, each times its scale and rounded once. Include inside
// the target region.

namespace pysparse {
namespace {

constexpr int64_t kLineCols = 64, kChunkCols = 16;  // of a register of int8, and of floats

// Which scales belong to the chunks of one line of columns; a chunk lies in one group.
struct LineScales {
  const float* of_rows[kLineCols / kChunkCols];

  LineScales(const RowScales& scales, int64_t tile, int64_t first_col) {
    for (int64_t c = 0; c < kLineCols / kChunkCols; ++c) {
      const int64_t group = (first_col + c * kChunkCols) / scales.group_cols;
      of_rows[c] = scales.scale_of(std::min(group, scales.groups - 1), tile);
    }
  }
};

inline void store_chunk(__m512 values, __mmask16 inside, float* out) {
  _mm512_mask_storeu_ps(out, inside, values);
}
// To nearest even; by hand, because the conversion instruction flushes denormals. A product of
// finite numbers is no NaN.
inline void store_chunk(__m512 values, __mmask16 inside, BFloat16* out) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_mask_storeu_epi16(out, inside, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

template <int kChunk, class T>
inline void scale_chunk(__m512i line, const LineScales& scales, int64_t row, int64_t cols, T* out) {
  const int64_t left = cols - kChunk * kChunkCols;
  if (left <= 0) return;
  const auto inside = static_cast<__mmask16>(left >= kChunkCols ? 0xffff : (1 << left) - 1);
  const __m512 whole =
      _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(line, kChunk)));
  store_chunk(_mm512_mul_ps(whole, _mm512_set1_ps(scales.of_rows[kChunk][row])), inside,
              out + kChunk * kChunkCols);
}

// The first `cols` of a line.
template <class T>
inline void store_line(__m512i line, const LineScales& scales, int64_t row, int64_t cols, T* out) {
  scale_chunk<0>(line, scales, row, cols, out);
  scale_chunk<1>(line, scales, row, cols, out);
  scale_chunk<2>(line, scales, row, cols, out);
  scale_chunk<3>(line, scales, row, cols, out);
}

}  // namespace
}  // namespace pysparse
