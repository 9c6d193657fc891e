// y = W x for int8 tiles: one expand fills a register with 16 rows x 4 columns of weights, one dot
// product of bytes per vector consumes it against the broadcast quad of inputs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/avx512vnni.h"
#include "simd/store_quantized.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VNNI)
#include "simd/flush_int8_avx512.h"
#include "simd/quantize_token.h"
#include "simd/short_cells.h"
namespace pysparse {
namespace {

constexpr int kMaxVectors = 16;
constexpr int64_t kHalfCell = 32;
constexpr int kShortVectors = 2;          // beyond, dots take the time and not loads
constexpr int64_t kPrefetchBytes = 3072;  // see linear_bitmap_avx512bf16.cpp

// In place, for the reason given in linear_bitmap_avx512bf16.cpp.
inline __m512i expand(__mmask64 mask, __m512i lanes) {
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(lanes) : "Yk"(mask));
  return lanes;
}

// kShort: most cells keep half their weights or less (simd/short_cells.h).
template <int kVectors, bool kShort>
void run_vectors(const TiledInt8View& weight, int64_t tile, const QuantizedTokens& input,
                 const OutputView& output, int64_t first_token) {
  constexpr int kChains = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;
  constexpr int kLines = (kChains + 1) / 2;  // of 64 bytes: what the cells consume at 50 % sparsity
  const auto* quads = reinterpret_cast<const int32_t*>(input.bytes);
  const uint64_t* masks = weight.masks + tile * weight.quads();
  const int8_t* next = weight.values + weight.tile_offsets[tile];
  const int64_t group_quads = weight.scales.group_cols / kQuadCols;
  alignas(64) float rows[kVectors][kTileRows] = {};
  __m512i sums[kChains][kVectors];
  const auto cell = [&](int64_t q, int c) __attribute__((always_inline)) {
    const uint64_t mask = masks[q];
    const int64_t count = _mm_popcnt_u64(mask);
    const __m512i packed =
        kShort && __builtin_expect(count <= kHalfCell, 1)
            ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(next)))
            : _mm512_loadu_si512(next);
    const __m512i weights = expand(mask, packed);
    next += count;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v)
      sums[c][v] =
          _mm512_dpbusd_epi32(sums[c][v], _mm512_set1_epi32(quads[q * kVectors + v]), weights);
  };
  for (int64_t g = 0; g < weight.scales.groups; ++g) {
    const int64_t end = g + 1 == weight.scales.groups ? weight.quads() : (g + 1) * group_quads;
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c)
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[c][v] = _mm512_setzero_si512();
    int64_t q = g * group_quads;
    for (; q + kChains <= end; q += kChains) {
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(next) + kPrefetchBytes + 64 * line, _MM_HINT_T0);
      if (q % 8 == 0)
        _mm_prefetch(reinterpret_cast<const char*>(masks + q) + kPrefetchBytes / 2, _MM_HINT_T0);
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) cell(q + c, c);
    }
    for (; q < end; ++q) cell(q, 0);
    flush_group<kChains, kVectors>(sums, weight.scales, g, tile, rows);
  }
  store_quantized(rows, tile, input, output, first_token);
}

struct Tile {
  template <int kVectors>
  static void run(const TiledInt8View& weight, int64_t tile, const QuantizedTokens& input,
                  const OutputView& output, int64_t first_token) {
    if constexpr (kVectors <= kShortVectors)
      if (mostly_short(weight.masks + tile * weight.quads(), weight.quads()))
        return run_vectors<kVectors, true>(weight, tile, input, output, first_token);
    run_vectors<kVectors, false>(weight, tile, input, output, first_token);
  }
};

void run(const TiledInt8View& weight, int64_t tile, const QuantizedTokens& input,
         const OutputView& output, int64_t first_token) {
  kTokenTable<Tile, kMaxVectors>[input.vectors() - 1](weight, tile, input, output, first_token);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr Int8BitmapLinear::Kernel kFloat32{quantize_token<float>, kMaxVectors, run};
constexpr Int8BitmapLinear::Kernel kBFloat16{quantize_token<BFloat16>, kMaxVectors, run};
const Register<Int8BitmapLinear> registered[] = {{DType::kFloat32, isa::kAvx512Vnni, kFloat32},
                                                 {DType::kBFloat16, isa::kAvx512Vnni, kBFloat16}};
}  // namespace
}  // namespace pysparse
