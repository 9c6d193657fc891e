// Writes a bf16 tile's 16 rows densely: 16 cells expand to 16 registers of (row, pair) dwords,
// whose 16 x 16 transpose is 32 consecutive columns of each row.
#include "isa/avx512vbmi2.h"
#include "pysparse/linear.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VBMI2)
#include "simd/transpose_avx512.h"
namespace pysparse {
namespace {

inline __m512i expand(__mmask32 mask, const uint16_t* source) {
  __m512i lanes = _mm512_loadu_si512(source);
  asm("vpexpandw %0, %0%{%1%}%{z%}"
      : "+v"(lanes)
      : "Yk"(mask));  // in place: see linear_bitmap_avx512bf16
  return lanes;
}

void run(const TiledBitmapView& weight, int64_t tile, int64_t rows, void* dense) {
  const uint16_t* next = static_cast<const uint16_t*>(weight.values) + weight.tile_offsets[tile];
  const uint32_t* masks = weight.masks + tile * weight.pairs();
  uint16_t* out = static_cast<uint16_t*>(dense);
  for (int64_t p = 0; p < weight.pairs(); p += 16) {
    const int64_t cells = std::min<int64_t>(16, weight.pairs() - p);
    __m512i block[16];
    for (int64_t i = 0; i < 16; ++i) {
      const uint32_t mask = i < cells ? masks[p + i] : 0u;
      block[i] = expand(mask, next);
      next += _mm_popcnt_u32(mask);
    }
    transpose(block);
    const int64_t cols = std::min<int64_t>(32, weight.cols - 2 * p);
    const auto inside = static_cast<__mmask32>(cols == 32 ? 0xffffffffull : (1ull << cols) - 1);
    for (int64_t r = 0; r < rows; ++r)
      _mm512_mask_storeu_epi16(out + r * weight.cols + 2 * p, inside, block[r]);
  }
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr BitmapUnpack::Kernel kKernel{run};
const Register<BitmapUnpack> registered{DType::kBFloat16, isa::kAvx512Vbmi2, kKernel};
}  // namespace
}  // namespace pysparse
