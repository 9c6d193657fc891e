// y = W x for int8 tiles on 256-bit vectors: two bytes of a mask word expand, by a table of
// shuffles, to 4 rows x 4 columns of 16-bit weights; a pairwise multiply-add takes them. (The
// multiply-add of bytes would saturate.)
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/avx2.h"
#include "simd/store_quantized.h"
#include "simd/token_table.h"

namespace pysparse {
namespace {

struct ByteExpandTable {
  alignas(64) uint8_t shuffle[256][8] = {};  // 0x80 writes zero

  constexpr ByteExpandTable() {
    for (int mask = 0; mask < 256; ++mask) {
      int source = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = mask >> lane & 1;
        shuffle[mask][lane] = static_cast<uint8_t>(kept ? source : 0x80);
        source += kept;
      }
    }
  }
};

constexpr ByteExpandTable kTable;

}  // namespace
}  // namespace pysparse

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/flush_int8_avx2.h"
#include "simd/quantize_token.h"
namespace pysparse {
namespace {

constexpr int kMaxVectors = 2;  // four accumulators a vector: 8 of the 16 registers
constexpr int64_t kPrefetchBytes = 2048;

inline __m128i expand_byte(uint32_t mask, const int8_t* source) {
  const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
  return _mm_shuffle_epi8(packed,
                          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTable.shuffle[mask])));
}

// The 16 weights of two mask bytes, 4 rows x 4 columns, as 16-bit numbers; moves `next` past them.
inline __m256i expand_word(uint32_t mask, const int8_t*& next) {
  const uint32_t low = mask & 0xffu, high = mask >> 8;
  const __m128i first = expand_byte(low, next);
  next += _mm_popcnt_u32(low);
  const __m128i second = expand_byte(high, next);
  next += _mm_popcnt_u32(high);
  return _mm256_cvtepi8_epi16(_mm_unpacklo_epi64(first, second));
}

template <int kVectors>
void run_vectors(const TiledInt8View& weight, int64_t tile, const QuantizedTokens& input,
                 const OutputView& output, int64_t first_token) {
  const auto* quads = reinterpret_cast<const int32_t*>(input.bytes);
  const uint64_t* masks = weight.masks + tile * weight.quads();
  const int8_t* next = weight.values + weight.tile_offsets[tile];
  const int64_t group_quads = weight.scales.group_cols / kQuadCols;
  float rows[kVectors][kTileRows] = {};
  for (int64_t g = 0; g < weight.scales.groups; ++g) {
    const int64_t end = g + 1 == weight.scales.groups ? weight.quads() : (g + 1) * group_quads;
    __m256i sums[kVectors][4];
    for (auto& vector : sums)
      for (auto& sum : vector) sum = _mm256_setzero_si256();
    for (int64_t q = g * group_quads; q < end; ++q) {
      _mm_prefetch(reinterpret_cast<const char*>(next) + kPrefetchBytes, _MM_HINT_T0);
      __m256i x[kVectors];
      for (int v = 0; v < kVectors; ++v)
        x[v] = _mm256_cvtepu8_epi16(_mm_set1_epi32(quads[q * kVectors + v]));
      const uint64_t mask = masks[q];
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        const __m256i weights = expand_word(mask >> (16 * b) & 0xffffu, next);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          sums[v][b] = _mm256_add_epi32(sums[v][b], _mm256_madd_epi16(weights, x[v]));
      }
    }
    for (int v = 0; v < kVectors; ++v) flush_pairs(sums[v], weight.scales, g, tile, rows[v]);
  }
  store_quantized(rows, tile, input, output, first_token);
}

struct Tile {
  template <int kVectors>
  static void run(const TiledInt8View& weight, int64_t tile, const QuantizedTokens& input,
                  const OutputView& output, int64_t first_token) {
    run_vectors<kVectors>(weight, tile, input, output, first_token);
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
const Register<Int8BitmapLinear> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                                 {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
