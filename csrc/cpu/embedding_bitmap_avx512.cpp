// fp32 rows: one expansion of stored values into the codebook's for 16 columns.
#include "isa/avx512.h"
#include "pysparse/embedding.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/embedding_rows.h"
namespace pysparse {
namespace {

struct FloatLanes {
  using Value = float;
  static constexpr int64_t kWidth = 16;
  static void spread(float* target, const float* code, const float* next, uint32_t bits,
                     uint32_t inside) {
    const auto lanes = static_cast<__mmask16>(inside);
    const __m512 base = _mm512_maskz_loadu_ps(lanes, code);
    const __m512 stored = _mm512_loadu_ps(next);  // the values are padded
    _mm512_mask_storeu_ps(target, lanes,
                          _mm512_mask_expand_ps(base, static_cast<__mmask16>(bits), stored));
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr EmbeddingLookup::Kernel kKernel{embedding_rows<FloatLanes>};
const Register<EmbeddingLookup> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
