#pragma once
// A block of an n:m weight written out: a lane of the dense block looks at the n weights of its
// group and takes the one whose index names its column. Include simd/nm_pattern.h first, then this
// inside the target region; Lanes<bytes> must have permute, equal and replace.

namespace pysparse {
namespace {

// Where the weights that a dense register may take lie: register `d` holds kRows rows of the block.
template <class P, int kBytes>
struct PlaceTables {
  static constexpr int kLanes = 64 / kBytes, kRows = kLanes / P::kCols;  // of a dense register
  static constexpr int kRegisters = 16 / kRows;
  static constexpr int kN = P::kLayout.n, kM = P::kLayout.m, kPerRow = P::kLayout.per_row;
  static constexpr int kHalfRows = kLanes / kPerRow < 16 ? kLanes / kPerRow : 16;  // of a register
  using Lane =
      std::conditional_t<kBytes == 1, uint8_t, std::conditional_t<kBytes == 2, uint16_t, uint32_t>>;
  alignas(64) Lane source[kRegisters][kN][kLanes] = {};
  alignas(64) Lane column[kLanes] = {};

  constexpr PlaceTables() {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int col = lane % P::kCols;
      column[lane] = static_cast<Lane>(col);
      for (int d = 0; d < kRegisters; ++d)
        for (int i = 0; i < kN; ++i) {
          const int row = (d * kRows + lane / P::kCols) % kHalfRows;
          source[d][i][lane] = static_cast<Lane>(row * kPerRow + (col / kM * kN + i) % kPerRow);
        }
    }
  }
};

// The pieces of a dense register, kPiece bytes of each of its rows, to rows `stride` bytes apart.
template <int kPiece>
inline void store_pieces(__m512i block, char* out, int64_t stride, int64_t rows) {
  alignas(64) char bytes[64];
  if constexpr (kPiece == 64) {
    if (rows > 0) _mm512_storeu_si512(out, block);
  } else if (rows >= 64 / kPiece) {
    const __m256i half[2] = {_mm512_castsi512_si256(block), _mm512_extracti64x4_epi64(block, 1)};
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      if constexpr (kPiece == 32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + h * stride), half[h]);
      } else {
        const __m128i quarter[2] = {_mm256_castsi256_si128(half[h]),
                                    _mm256_extracti128_si256(half[h], 1)};
#pragma GCC unroll 2
        for (int q = 0; q < 2; ++q) {
          char* target = out + (2 * h + q) * (16 / kPiece) * stride;
          if constexpr (kPiece == 16) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target), quarter[q]);
          } else {
            static_assert(kPiece == 8);
            // By memcpy: rows of odd lengths begin at addresses that no 8-byte type may have.
            const int64_t low = _mm_cvtsi128_si64(quarter[q]);
            const int64_t high = _mm_extract_epi64(quarter[q], 1);
            __builtin_memcpy(target, &low, sizeof low);
            __builtin_memcpy(target + stride, &high, sizeof high);
          }
        }
      }
    }
  } else {  // the last tile may end within the register
    _mm512_store_si512(bytes, block);
    for (int64_t r = 0; r < rows; ++r)
      __builtin_memcpy(out + r * stride, bytes + r * kPiece, kPiece);
  }
}

// Writes one block from its decoded places and its weights, in the registers of [step][half].
template <class P, int kBytes, int kHalves>
inline void place_block(const __m512i (&places)[P::kSteps][kHalves],
                        const __m512i (&weights)[P::kSteps][kHalves], char* out, int64_t stride,
                        int64_t rows) {
  using Tables = PlaceTables<P, kBytes>;
  static constexpr Tables tables;
  const __m512i column = _mm512_load_si512(tables.column);
#pragma GCC unroll 16
  for (int d = 0; d < Tables::kRegisters; ++d) {
    const int half = d * Tables::kRows / Tables::kHalfRows;
    __m512i dense = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = Tables::kN - 1; i >= 0; --i) {  // the first of equal indices is the weight
      const int step = P::kSteps > 1 ? i / Tables::kPerRow : 0;
      const __m512i source = _mm512_load_si512(tables.source[d][i]);
      const auto here =
          Lanes<kBytes>::equal(Lanes<kBytes>::permute(source, places[step][half]), column);
      dense = Lanes<kBytes>::replace(dense, here, source, weights[step][half]);
    }
    store_pieces<P::kCols * kBytes>(dense, out + d * Tables::kRows * stride, stride,
                                    rows - d * Tables::kRows);
  }
}

}  // namespace
}  // namespace pysparse
