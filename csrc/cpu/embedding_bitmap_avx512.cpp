// fp32 rows: one expansion of stored values into the codebook's for 16 columns; bags add it where
// it is.
#include "isa/avx512.h"
#include "pysparse/embedding.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/embedding_rows.h"
namespace pysparse {
namespace {

struct FloatLanes {
  using Value = float;
  static constexpr int64_t kWidth = 16;
  static __m512 decode(const float* code, const float* next, uint32_t bits, uint32_t inside) {
    const __m512 base = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), code);
    const __m512 stored = _mm512_loadu_ps(next);  // the values are padded
    return _mm512_mask_expand_ps(base, static_cast<__mmask16>(bits), stored);
  }
  static void store(float* target, __m512 entries, uint32_t inside) {
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>(inside), entries);
  }
  // Sixteen entries as numbers, of the first or second half of a register.
  static __m512 numbers(__m512 entries, int) { return entries; }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr EmbeddingLookup::Kernel kKernel{embedding_rows<FloatLanes>, embedding_sums<FloatLanes>};
const Register<EmbeddingLookup> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
