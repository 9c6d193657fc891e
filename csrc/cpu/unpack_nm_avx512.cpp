// Writes the rows of an fp32 or bf16 N:M tile densely, block by block.
#include <algorithm>
#include <type_traits>

#include "isa/avx512.h"
#include "pysparse/nm_slots.h"
#include "simd/nm_pattern.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/nm_decode_avx512.h"
namespace pysparse {
namespace {

template <int kBytes>
struct Lanes;

template <>
struct Lanes<2> {
  static __m512i permute(__m512i source, __m512i from) {
    return _mm512_permutexvar_epi16(source, from);
  }
  static __mmask32 equal(__m512i a, __m512i b) { return _mm512_cmpeq_epi16_mask(a, b); }
  static __m512i replace(__m512i old, __mmask32 here, __m512i source, __m512i from) {
    return _mm512_mask_permutexvar_epi16(old, here, source, from);
  }
};

template <>
struct Lanes<4> {
  static __m512i permute(__m512i source, __m512i from) {
    return _mm512_permutexvar_epi32(source, from);
  }
  static __mmask16 equal(__m512i a, __m512i b) { return _mm512_cmpeq_epi32_mask(a, b); }
  static __m512i replace(__m512i old, __mmask16 here, __m512i source, __m512i from) {
    return _mm512_mask_permutexvar_epi32(old, here, source, from);
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
  struct Blocks {
    // The blocks that are whole.
    static void run(const NmView& weight, int64_t tile, int64_t rows, T* dense) {
      constexpr int kBytes = sizeof(T), kHalves = kBytes / 2;
      const NmLayout& layout = weight.layout;
      const T* values = static_cast<const T*>(weight.values) + tile * layout.tile_values();
      const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
      const int64_t stride = layout.cols * kBytes, whole = layout.groups() / layout.block_groups();
      for (int64_t b = 0; b < whole; ++b) {
        __m512i places[P::kSteps][kHalves], weights[P::kSteps][kHalves];
#pragma GCC unroll 2
        for (int s = 0; s < P::kSteps; ++s) {
          if constexpr (kBytes == 2) {
            places[s][0] = decode_words<P>(indices);
          } else {
            places[s][0] = decode_dwords<P, 0>(indices);
            places[s][1] = decode_dwords<P, 1>(indices);
          }
          for (int h = 0; h < kHalves; ++h)
            weights[s][h] = _mm512_loadu_si512(values + h * 64 / kBytes);
          values += P::kStepValues;
          indices += P::kStepBytes;
        }
        place_block<P, kBytes, kHalves>(
            places, weights, reinterpret_cast<char*>(dense + b * P::kCols), stride, rows);
      }
    }
  };

  static void run(const NmView& weight, int64_t tile, int64_t rows, void* dense) {
    const NmLayout& layout = weight.layout;
    T* out = static_cast<T*>(dense);
    with_pattern<Blocks, 2>(layout, weight, tile, rows, out);
    const int64_t whole = layout.groups() / layout.block_groups();
    if (whole * layout.block_cols() < layout.cols)
      unpack_from<T>(weight, tile, rows, whole, out,
                     [](T value, int64_t, int64_t) { return value; });
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr NmUnpack::Kernel kFloat32{covers_common, Of<float>::run};
constexpr NmUnpack::Kernel kBFloat16{covers_common, Of<BFloat16>::run};
const Register<NmUnpack> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                         {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
