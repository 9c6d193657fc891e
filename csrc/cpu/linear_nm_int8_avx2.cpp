// y = W x for int8 N:M weights on 256-bit vectors: 16 lanes of 16 bits are 4 rows x 4 kept weights.
// Their index fields come to the lanes by a shuffle, a multiply that stands in for the shift by
// lane that AVX2 lacks, and a shift; they pick the inputs by a byte shuffle, and a pairwise
// multiply-add takes them. (The multiply-add of bytes would saturate.)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa/avx2.h"
#include "simd/nm_pattern.h"
#include "simd/store_quantized.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/flush_int8_avx2.h"
#include "simd/quantize_token.h"
namespace pysparse {
namespace {

constexpr int kMaxVectors = 2;  // four accumulators a vector: 8 of the 16 registers
constexpr int64_t kPrefetchBytes = 2048;

// Field i of 16 lies in the 16 bits from byte i * kBits / 8 on; times a power of two it is their
// top.
template <class P>
struct FieldSpread {
  alignas(32) uint8_t shuffle[32] = {};
  alignas(32) uint16_t factor[16] = {}, start[16] = {};

  constexpr FieldSpread() {
    for (int i = 0; i < 16; ++i) {
      const int bit = i * P::kBits;
      for (int b = 0; b < 2; ++b) shuffle[2 * i + b] = static_cast<uint8_t>(bit / 8 + b);
      factor[i] = static_cast<uint16_t>(1u << (16 - P::kBits - bit % 8));
      start[i] = static_cast<uint16_t>(0x8000 | P::group_start(i));  // the upper byte picks zero
    }
  }
};

template <class P>
inline __m256i decode(const uint8_t* indices) {
  static constexpr FieldSpread<P> spread;
  const __m256i bytes =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(indices)));
  const __m256i words = _mm256_shuffle_epi8(
      bytes, _mm256_load_si256(reinterpret_cast<const __m256i*>(spread.shuffle)));
  const __m256i top =
      _mm256_mullo_epi16(words, _mm256_load_si256(reinterpret_cast<const __m256i*>(spread.factor)));
  return _mm256_or_si256(_mm256_srli_epi16(top, 16 - P::kBits),
                         _mm256_load_si256(reinterpret_cast<const __m256i*>(spread.start)));
}

// The inputs of one block in both halves of a register, or of two where it has 32 columns.
template <int kCols>
struct Inputs {
  __m256i low, high;

  explicit Inputs(const uint8_t* x) {
    if constexpr (kCols == 8) {
      int64_t eight;
      std::memcpy(&eight, x, sizeof eight);
      low = high = _mm256_set1_epi64x(eight);
    } else {
      low = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
      high = low;
      if constexpr (kCols == 32)
        high =
            _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 16)));
    }
  }

  __m256i choose(__m256i places) const {
    const __m256i first = _mm256_shuffle_epi8(low, places);
    if constexpr (kCols < 32) return first;
    // The shuffle looks at four bits of a place; the fifth chooses the half.
    return _mm256_blendv_epi8(first, _mm256_shuffle_epi8(high, places),
                              _mm256_slli_epi16(places, 3));
  }
};

inline __m256i load_weights(const int8_t* values) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}

template <class P>
struct Tile {
  static_assert(P::kSteps == 1 && P::kBits <= 4);

  template <int kVectors>
  static void run(const NmView& weight, const RowScales& scales, int64_t tile,
                  const QuantizedTokens& input, const OutputView& output, int64_t first_token) {
    const NmLayout& layout = weight.layout;
    const uint8_t* x = input.bytes;
    const int8_t* values = static_cast<const int8_t*>(weight.values) + tile * layout.tile_values();
    const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
    const int64_t group_blocks =
        scales.groups == 1 ? layout.blocks() : scales.group_cols / P::kCols;
    const int64_t tail_group = layout.groups() * layout.m / scales.group_cols;
    float rows[kVectors][kTileRows] = {};
    __m256i sums[kVectors][4];  // rows 4 part to 4 part + 3 of the tile
    const auto add = [&](int v, int part, __m256i weights,
                         __m256i inputs) __attribute__((always_inline)) {
      sums[v][part] = _mm256_add_epi32(sums[v][part], _mm256_madd_epi16(weights, inputs));
    };
    const auto block = [&]() __attribute__((always_inline)) {
      _mm_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes, _MM_HINT_T0);
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        const __m256i places = decode<P>(indices + 2 * part * P::kBits);
        const __m256i weights = load_weights(values + 16 * part);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          add(v, part, weights, Inputs<P::kCols>(x + v * P::kCols).choose(places));
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
          const __m256i inputs = _mm256_cvtepu8_epi16(_mm_set1_epi32(quad));
          for (int part = 0; part < 4; ++part)
            add(v, part, load_weights(values + 16 * part), inputs);
        }
        values += P::kStepValues;
        x += 4 * kVectors;
      }
    };
    for (int64_t g = 0; g < scales.groups; ++g) {
      for (auto& vector : sums)
        for (auto& sum : vector) sum = _mm256_setzero_si256();
      const int64_t end = std::min(layout.blocks(), (g + 1) * group_blocks);
      for (int64_t b = g * group_blocks; b < end; ++b) block();
      if (g == tail_group) tail();
      for (int v = 0; v < kVectors; ++v) flush_pairs(sums[v], scales, g, tile, rows[v]);
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
const Register<NmInt8Linear> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                             {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
