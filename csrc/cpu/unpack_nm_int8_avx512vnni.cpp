// Writes the rows of an int8 N:M tile densely: blocks are placed in a line of 64 columns of 16
// rows, which then is scaled row by row.
#include <algorithm>
#include <type_traits>

#include "isa/avx512vnni.h"
#include "pysparse/nm_slots.h"
#include "simd/nm_pattern.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VNNI)
#include "simd/nm_decode_bytes_avx512.h"
#include "simd/scale_int8_avx512.h"
namespace pysparse {
namespace {

template <int kBytes>
struct Lanes;

template <>
struct Lanes<1> {
  static __m512i permute(__m512i source, __m512i from) {
    return _mm512_permutexvar_epi8(source, from);
  }
  static __mmask64 equal(__m512i a, __m512i b) { return _mm512_cmpeq_epi8_mask(a, b); }
  static __m512i replace(__m512i old, __mmask64 here, __m512i source, __m512i from) {
    return _mm512_mask_permutexvar_epi8(old, here, source, from);
  }
};

}  // namespace
}  // namespace pysparse
#include "simd/nm_place_avx512.h"
namespace pysparse {
namespace {

template <class T>
struct Of {
  template <class P>
  struct Lines {
    static void run(const NmView& weight, const RowScales& scales, int64_t tile, int64_t rows,
                    T* dense) {
      const NmLayout& layout = weight.layout;
      const int8_t* values =
          static_cast<const int8_t*>(weight.values) + tile * layout.tile_values();
      const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
      const int64_t whole = layout.groups() / layout.block_groups();
      alignas(64) char line[kTileRows][kLineCols];
      for (int64_t b = 0; b < whole;) {
        const int64_t first = b * P::kCols, end = std::min(whole, b + kLineCols / P::kCols);
        for (char* out = line[0]; b < end; ++b, out += P::kCols) {
          const __m512i places[1][1] = {{decode_bytes<P>(indices)}};
          const __m512i weights[1][1] = {{_mm512_loadu_si512(values)}};
          place_block<P, 1, 1>(places, weights, out, kLineCols, kTileRows);
          values += P::kStepValues;
          indices += P::kStepBytes;
        }
        const LineScales line_scales(scales, tile, first);
        for (int64_t r = 0; r < rows; ++r)
          store_line(_mm512_load_si512(line[r]), line_scales, r, b * P::kCols - first,
                     dense + r * layout.cols + first);
      }
    }
  };

  static void run(const NmView& weight, const RowScales& scales, int64_t tile, int64_t rows,
                  void* dense) {
    const NmLayout& layout = weight.layout;
    T* out = static_cast<T*>(dense);
    with_pattern<Lines, 4>(layout, weight, scales, tile, rows, out);
    const int64_t whole = layout.groups() / layout.block_groups();
    if (whole * layout.block_cols() == layout.cols) return;
    unpack_from<int8_t>(weight, tile, rows, whole, out,
                        [&](int8_t value, int64_t col, int64_t row) {
                          const float scale = scales.scale_of(col / scales.group_cols, tile)[row];
                          T rounded;
                          assign(rounded, static_cast<float>(value) * scale);
                          return rounded;
                        });
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr int64_t kGroupMultiple = 16;  // kChunkCols
constexpr NmInt8Unpack::Kernel kFloat32{kGroupMultiple, covers_common, Of<float>::run};
constexpr NmInt8Unpack::Kernel kBFloat16{kGroupMultiple, covers_common, Of<BFloat16>::run};
const Register<NmInt8Unpack> registered[] = {{DType::kFloat32, isa::kAvx512Vnni, kFloat32},
                                             {DType::kBFloat16, isa::kAvx512Vnni, kBFloat16}};
}  // namespace
}  // namespace pysparse
