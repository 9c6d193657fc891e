// bf16 rows: one expansion of stored values into the codebook's for 32 columns.
#include "isa/avx512vbmi2.h"
#include "pysparse/embedding.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512VBMI2)
#include "simd/embedding_rows.h"
namespace pysparse {
namespace {

struct HalfLanes {
  using Value = uint16_t;
  static constexpr int64_t kWidth = 32;
  static void spread(uint16_t* target, const uint16_t* code, const uint16_t* next, uint32_t bits,
                     uint32_t inside) {
    const __m512i base = _mm512_maskz_loadu_epi16(inside, code);
    const __m512i stored = _mm512_loadu_si512(next);  // the values are padded
    _mm512_mask_storeu_epi16(target, inside, _mm512_mask_expand_epi16(base, bits, stored));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr EmbeddingLookup::Kernel kKernel{embedding_rows<HalfLanes>};
const Register<EmbeddingLookup> registered{DType::kBFloat16, isa::kAvx512Vbmi2, kKernel};
}  // namespace
}  // namespace pysparse
