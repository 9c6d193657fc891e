// Writes an fp32 tile's 16 rows densely: the same half of 8 cells expands to 8 registers of (row,
// pair) qwords, whose 8 x 8 transpose is 16 consecutive columns of each of 8 rows.
#include <algorithm>

#include "isa/avx512.h"
#include "pysparse/linear.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
namespace pysparse {
namespace {

constexpr int kHalf = 8;  // rows in half a tile, and cells in a block

inline void transpose(__m512d (&r)[kHalf]) {
  __m512d t[kHalf];
  for (int i = 0; i < kHalf; i += 2) {
    t[i] = _mm512_unpacklo_pd(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_pd(r[i], r[i + 1]);
  }
  for (int i = 0; i < kHalf; i += 4) {
    for (int j = 0; j < 2; ++j) {
      r[i + j] = _mm512_shuffle_f64x2(t[i + j], t[i + j + 2], 0x88);
      r[i + j + 2] = _mm512_shuffle_f64x2(t[i + j], t[i + j + 2], 0xdd);
    }
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_f64x2(r[j], r[j + 4], 0x88);
    t[j + 4] = _mm512_shuffle_f64x2(r[j], r[j + 4], 0xdd);
  }
  for (int i = 0; i < kHalf; ++i) r[i] = t[i];
}

void run(const TiledBitmapView& weight, int64_t tile, int64_t rows, void* dense) {
  const float* next = static_cast<const float*>(weight.values) + weight.tile_offsets[tile];
  const uint32_t* masks = weight.masks + tile * weight.pairs();
  float* out = static_cast<float*>(dense);
  for (int64_t p = 0; p < weight.pairs(); p += kHalf) {
    const int64_t cells = std::min<int64_t>(kHalf, weight.pairs() - p);
    __m512d upper[kHalf], lower[kHalf];
    for (int64_t i = 0; i < kHalf; ++i) {
      const uint32_t mask = i < cells ? masks[p + i] : 0u;
      upper[i] = _mm512_castps_pd(_mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask), next));
      next += _mm_popcnt_u32(mask & 0xffffu);
      lower[i] =
          _mm512_castps_pd(_mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask >> 16), next));
      next += _mm_popcnt_u32(mask >> 16);
    }
    transpose(upper);
    transpose(lower);
    const int64_t cols = std::min<int64_t>(16, weight.cols - 2 * p);
    const auto inside = static_cast<__mmask16>((1u << cols) - 1);
    for (int64_t r = 0; r < rows; ++r)
      _mm512_mask_storeu_ps(out + r * weight.cols + 2 * p, inside,
                            _mm512_castpd_ps(r < kHalf ? upper[r] : lower[r - kHalf]));
  }
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr BitmapUnpack::Kernel kKernel{run};
const Register<BitmapUnpack> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
