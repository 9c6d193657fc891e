// Writes an int8 tile's 16 rows densely: 16 cells expand to 16 registers of (row, quad) dwords,
// whose transpose is 64 consecutive columns of each row.
#include <algorithm>

#include "isa/avx512vnni.h"
#include "pysparse/int8.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VNNI)
#include "simd/scale_int8_avx512.h"
#include "simd/transpose_avx512.h"
namespace pysparse {
namespace {

// In place, for the reason given in linear_bitmap_avx512bf16.cpp.
inline __m512i expand(__mmask64 mask, const int8_t* source) {
  __m512i lanes = _mm512_loadu_si512(source);
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(lanes) : "Yk"(mask));
  return lanes;
}

template <class T>
void run(const TiledInt8View& weight, int64_t tile, int64_t rows, void* dense) {
  const int8_t* next = weight.values + weight.tile_offsets[tile];
  const uint64_t* masks = weight.masks + tile * weight.quads();
  T* out = static_cast<T*>(dense);
  for (int64_t q = 0; q < weight.quads(); q += 16) {
    const int64_t cells = std::min<int64_t>(16, weight.quads() - q);
    __m512i block[16];
    for (int64_t i = 0; i < 16; ++i) {
      const uint64_t mask = i < cells ? masks[q + i] : 0u;
      block[i] = expand(mask, next);
      next += _mm_popcnt_u64(mask);
    }
    transpose(block);
    const int64_t col = kQuadCols * q, cols = std::min(kLineCols, weight.cols - col);
    const LineScales scales(weight.scales, tile, col);
    for (int64_t r = 0; r < rows; ++r)
      store_line(block[r], scales, r, cols, out + r * weight.cols + col);
  }
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr int64_t kGroupMultiple = 16;  // kChunkCols
constexpr Int8BitmapUnpack::Kernel kFloat32{kGroupMultiple, run<float>};
constexpr Int8BitmapUnpack::Kernel kBFloat16{kGroupMultiple, run<BFloat16>};
const Register<Int8BitmapUnpack> registered[] = {{DType::kFloat32, isa::kAvx512Vnni, kFloat32},
                                                 {DType::kBFloat16, isa::kAvx512Vnni, kBFloat16}};
}  // namespace
}  // namespace pysparse
