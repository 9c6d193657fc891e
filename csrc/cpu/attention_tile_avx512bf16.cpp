// Softmax attention of 64 bf16 rows: both products are dots of pairs, keys broadcast against rows
// in lanes; weights are rounded to bf16 and summed as rounded, so that they sum to the denominator.
#include <algorithm>
#include <cmath>

#include "isa/avx512bf16.h"
#include "pysparse/attention.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512BF16)
#include "simd/attention_avx512.h"
#include "simd/attention_tile.h"
namespace pysparse {
namespace {

struct Dots : Lanes512 {
  using T = BFloat16;
  static constexpr int kKeysPerWord = 2;

  static Vector dot(Words a, Words b, Vector c) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static Vector exp2(Vector x) { return exp2_of<3>(x); }

  // The low half of word i is lane i of `even`, the high half that of `odd`.
  static Vector store_pair(Vector even, Vector odd, Vector sum, uint32_t* words) {
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));
    const __m512i pairs = _mm512_permutexvar_epi16(order, halves);
    _mm512_store_si512(words, pairs);
    return dot(pairs, _mm512_set1_epi32(0x3f803f80), sum);  // two ones
  }

  static __mmask32 first_values(int64_t count) {
    return count >= 32 ? 0xffffffffu : count <= 0 ? 0u : (1u << count) - 1u;
  }
  static Words row_words(const BFloat16* p, int64_t count) {
    return _mm512_maskz_loadu_epi16(first_values(count), p);
  }

  static void interleave(const BFloat16* even, const BFloat16* odd, int dim, int padded,
                         uint32_t* words) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int d = 0; d < padded; d += 32) {
      const __m512i a = row_words(even + d, dim - d);
      const __m512i b = odd ? row_words(odd + d, dim - d) : _mm512_setzero_si512();
      store_words(words + d, _mm512_permutex2var_epi16(a, low, b), 16);
      store_words(words + d + 16, _mm512_permutex2var_epi16(a, high, b), padded - d - 16);
    }
  }

  using Lanes512::store_row;
  static void store_row(BFloat16* p, Vector v, int64_t count) {
    _mm256_mask_storeu_epi16(p, first(count), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr AttentionTile::Kernel kKernel = Tile<Dots>::kernel();
const Register<AttentionTile> registered{DType::kBFloat16, isa::kAvx512Bf16, kKernel};
}  // namespace
}  // namespace pysparse
