// y = W x by pairs of bf16: the two inputs' tokens are interleaved by an unpack, so that one
// widening dot multiplies an arbitrary pair of columns for 16 tokens.
#include "isa/avx512bf16.h"
#include "pysparse/linear.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512BF16)
#include "simd/pairs_avx512.h"
namespace pysparse {
namespace {

struct DotPairs {
  using Entry = int32_t;  // low half first
  using Input = uint16_t;
  using Sum = __m512;
  static constexpr int kLanes = 16, kRows = 4;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Sum sum) { _mm512_store_ps(p, sum); }

  template <int kVectors>
  static void add(Entry entry, const uint16_t* x0, const uint16_t* x1, Sum (&sums)[kVectors]) {
    const auto weights = reinterpret_cast<__m512bh>(_mm512_set1_epi32(entry));
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) {
      __m512i a = _mm512_load_si512(x0 + 16 * v), b = _mm512_load_si512(x1 + 16 * v);
      asm("" : "+v"(a), "+v"(b));  // loaded once, not once for each unpack
      const auto low = reinterpret_cast<__m512bh>(_mm512_unpacklo_epi16(a, b));
      const auto high = reinterpret_cast<__m512bh>(_mm512_unpackhi_epi16(a, b));
      sums[v] = _mm512_dpbf16_ps(sums[v], weights, low);
      sums[v + 1] = _mm512_dpbf16_ps(sums[v + 1], weights, high);
    }
  }
};

// The same for 16 tokens, which fill half a register: two dots of eight.
struct NarrowDotPairs {
  using Entry = int32_t;
  using Input = uint16_t;
  using Sum = __m256;
  static constexpr int kLanes = 8, kRows = 4;

  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Sum sum) { _mm256_store_ps(p, sum); }

  template <int kVectors>
  static void add(Entry entry, const uint16_t* x0, const uint16_t* x1, Sum (&sums)[kVectors]) {
    static_assert(kVectors == 2);
    const auto weights = reinterpret_cast<__m256bh>(_mm256_set1_epi32(entry));
    __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(x0));
    __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(x1));
    asm("" : "+v"(a), "+v"(b));  // loaded once, not once for each unpack
    const auto low = reinterpret_cast<__m256bh>(_mm256_unpacklo_epi16(a, b));
    const auto high = reinterpret_cast<__m256bh>(_mm256_unpackhi_epi16(a, b));
    sums[0] = _mm256_dpbf16_ps(sums[0], weights, low);
    sums[1] = _mm256_dpbf16_ps(sums[1], weights, high);
  }
};

// 16 tokens of one column, so that an unpack's low half is tokens 0 to 7 and its high half tokens 8
// to 15.
inline void store_narrow(__m512i pairs, uint16_t* even, uint16_t* odd, bool has_odd) {
  const auto order = [](__m256i tokens) { return _mm256_permute4x64_epi64(tokens, 0xd8); };
  _mm256_store_si256(reinterpret_cast<__m256i*>(even), order(_mm512_cvtepi32_epi16(pairs)));
  if (has_odd)
    _mm256_store_si256(reinterpret_cast<__m256i*>(odd),
                       order(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16))));
}

// 32 tokens of one column fill a register so that an unpack's low half is tokens 0 to 15 and its
// high half tokens 16 to 31: lane l holds tokens 4 l to 4 l + 3 and 16 + 4 l to 16 + 4 l + 3.
inline void store_columns(__m512i first, __m512i second, uint16_t* even, uint16_t* odd,
                          bool has_odd) {
  alignas(64) static constexpr uint16_t kEven[32] = {0,  2,  4,  6,  32, 34, 36, 38, 8,  10, 12,
                                                     14, 40, 42, 44, 46, 16, 18, 20, 22, 48, 50,
                                                     52, 54, 24, 26, 28, 30, 56, 58, 60, 62};
  const __m512i pick = _mm512_load_si512(kEven);
  _mm512_store_si512(even, _mm512_permutex2var_epi16(first, pick, second));
  const __m512i pick_odd = _mm512_add_epi16(pick, _mm512_set1_epi16(1));
  if (has_odd) _mm512_store_si512(odd, _mm512_permutex2var_epi16(first, pick_odd, second));
}

bool transpose(const void* x, int64_t cols, int tokens, int width, int64_t begin, int64_t end,
               void* input) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 special = 0;
  for (int64_t k = begin; k < end; k += 32) {
    const int64_t count = end - k < 32 ? end - k : 32;
    const auto lanes = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    for (int t = 0; t < width; t += 32) {
      __m512i rows[2][16];  // of 16 pairs of columns, for tokens t to t + 31
      const int halves = width - t < 32 ? 1 : 2;
      for (int half = 0; half < halves; ++half) {
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int token = t + 16 * half + i;
          const __m512i row = token < tokens
                                  ? _mm512_maskz_loadu_epi16(
                                        lanes, static_cast<const uint16_t*>(x) + token * cols + k)
                                  : _mm512_setzero_si512();
          special |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(row, exponent), exponent);
          rows[half][i] = row;
        }
        transpose_words(rows[half]);
      }
      uint16_t* out = static_cast<uint16_t*>(input) + k * width + t;
      for (int i = 0; 2 * i < count; ++i) {
        uint16_t *even = out + 2 * i * width, *odd = even + width;
        if (halves == 1)
          store_narrow(rows[0][i], even, odd, 2 * i + 1 < count);
        else
          store_columns(rows[0][i], rows[1][i], even, odd, 2 * i + 1 < count);
      }
    }
  }
  return special == 0;
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr PairsLinear::Kernel kKernel{DType::kBFloat16, 64, transpose,
                                      run_pairs<DotPairs, BFloat16, NarrowDotPairs>};
const Register<PairsLinear> registered{DType::kBFloat16, isa::kAvx512Bf16, kKernel};
}  // namespace
}  // namespace pysparse
