// bf16 rows: one expansion of stored values into the codebook's for 32 columns; bags add it where
// it is.
#include "isa/avx512vbmi2.h"
#include "pysparse/embedding.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VBMI2)
#include "simd/embedding_rows.h"
namespace pysparse {
namespace {

struct HalfLanes {
  using Value = uint16_t;
  static constexpr int64_t kWidth = 32;
  static __m512i decode(const uint16_t* code, const uint16_t* next, uint32_t bits,
                        uint32_t inside) {
    const __m512i base = _mm512_maskz_loadu_epi16(inside, code);
    const __m512i stored = _mm512_loadu_si512(next);  // the values are padded
    return _mm512_mask_expand_epi16(base, bits, stored);
  }
  static void store(uint16_t* target, __m512i entries, uint32_t inside) {
    _mm512_mask_storeu_epi16(target, inside, entries);
  }
  // Sixteen entries as numbers, of the first or second half of a register.
  static __m512 numbers(__m512i entries, int half) {
    const __m256i bits =
        half ? _mm512_extracti64x4_epi64(entries, 1) : _mm512_castsi512_si256(entries);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr EmbeddingLookup::Kernel kKernel{embedding_rows<HalfLanes>, embedding_sums<HalfLanes>};
const Register<EmbeddingLookup> registered{DType::kBFloat16, isa::kAvx512Vbmi2, kKernel};
}  // namespace
}  // namespace pysparse
