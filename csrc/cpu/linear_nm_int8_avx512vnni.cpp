// y = W x for int8 N:M weights: a register holds 16 rows x 4 kept weights; their indices pick the
// bytes of a block of inputs by one permute per vector, and a dot product of bytes takes the quads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/avx512vnni.h"
#include "simd/nm_pattern.h"
#include "simd/store_quantized.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VNNI)
#include "simd/flush_int8_avx512.h"
#include "simd/nm_decode_bytes_avx512.h"
#include "simd/quantize_token.h"
namespace pysparse {
namespace {

constexpr int kMaxVectors = 8;
constexpr int64_t kPrefetchBytes = 3072;  // see linear_bitmap_avx512bf16.cpp

template <int kCols>
inline __m512i load_inputs(const uint8_t* x) {
  if constexpr (kCols == 8) {
    int64_t eight;
    std::memcpy(&eight, x, sizeof eight);
    return _mm512_set1_epi64(eight);
  } else if constexpr (kCols == 16) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  } else {
    static_assert(kCols == 32);
    return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
}

template <class P>
struct Tile {
  static_assert(P::kSteps == 1);

  template <int kVectors>
  static void run(const NmView& weight, const RowScales& scales, int64_t tile,
                  const QuantizedTokens& input, const OutputView& output, int64_t first_token) {
    constexpr int kChains = kVectors >= 4 ? 2 : kVectors >= 2 ? 4 : 8;
    const NmLayout& layout = weight.layout;
    const uint8_t* x = input.bytes;
    const int8_t* values = static_cast<const int8_t*>(weight.values) + tile * layout.tile_values();
    const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
    const int64_t group_blocks =
        scales.groups == 1 ? layout.blocks() : scales.group_cols / P::kCols;
    const int64_t tail_group = layout.groups() * layout.m / scales.group_cols;
    alignas(64) float rows[kVectors][kTileRows] = {};
    __m512i sums[kChains][kVectors];
    const auto block = [&](int c) __attribute__((always_inline)) {
      const __m512i places = decode_bytes<P>(indices);
      const __m512i weights = _mm512_loadu_si512(values);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const __m512i chosen =
            _mm512_permutexvar_epi8(places, load_inputs<P::kCols>(x + v * P::kCols));
        sums[c][v] = _mm512_dpbusd_epi32(sums[c][v], chosen, weights);
      }
      values += P::kStepValues;
      indices += P::kStepBytes;
      x += kVectors * P::kCols;
    };
    const auto tail = [&] {
      for (int64_t s = 0; s < layout.tail_steps(); ++s) {
        for (int v = 0; v < kVectors; ++v) {
          int32_t quad;
          std::memcpy(&quad, x + 4 * v, sizeof quad);
          sums[0][v] =
              _mm512_dpbusd_epi32(sums[0][v], _mm512_set1_epi32(quad), _mm512_loadu_si512(values));
        }
        values += P::kStepValues;
        x += 4 * kVectors;
      }
    };
    for (int64_t g = 0; g < scales.groups; ++g) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[c][v] = _mm512_setzero_si512();
      int64_t b = g * group_blocks;
      const int64_t end = std::min(layout.blocks(), b + group_blocks);
      for (; b + kChains <= end; b += kChains) {
#pragma GCC unroll 8
        for (int c = 0; c < kChains; ++c) {
          _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes, _MM_HINT_T0);
          if (c % 2 == 0)
            _mm_prefetch(reinterpret_cast<const char*>(indices) + kPrefetchBytes / 2, _MM_HINT_T0);
          block(c);
        }
      }
      for (; b < end; ++b) block(0);
      if (g == tail_group) tail();
      flush_group<kChains, kVectors>(sums, scales, g, tile, rows);
    }
    store_quantized(rows, tile, input, output, first_token);
  }
};

template <class P>
struct Vectors {
  static void run(const NmView& weight, const RowScales& scales, int64_t tile,
                  const QuantizedTokens& input, const OutputView& output, int64_t first_token) {
    kTokenTable<Tile<P>, kMaxVectors>[input.vectors() - 1](weight, scales, tile, input, output,
                                                           first_token);
  }
};

void run(const NmView& weight, const RowScales& scales, int64_t tile, const QuantizedTokens& input,
         const OutputView& output, int64_t first_token) {
  with_pattern<Vectors, 4>(weight.layout, weight, scales, tile, input, output, first_token);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr NmInt8Linear::Kernel kFloat32{quantize_token<float>, kMaxVectors, covers_common, run};
constexpr NmInt8Linear::Kernel kBFloat16{quantize_token<BFloat16>, kMaxVectors, covers_common, run};
const Register<NmInt8Linear> registered[] = {{DType::kFloat32, isa::kAvx512Vnni, kFloat32},
                                             {DType::kBFloat16, isa::kAvx512Vnni, kBFloat16}};
}  // namespace
}  // namespace pysparse
