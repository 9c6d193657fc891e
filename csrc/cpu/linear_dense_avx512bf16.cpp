// y = W x for a dense bf16 weight: 32 widening products an instruction.
#include "isa/avx512bf16.h"
#include "pysparse/linear.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512BF16)
#include "simd/dense_rows.h"
namespace pysparse {
namespace {

struct Vector {
  using Element = uint16_t;
  using Input = uint16_t;
  using Block = __m512bh;
  using Sum = __m512;
  static constexpr int kLanes = 32, kMaxTokens = 4, kAccumulators = 16;

  static Block load(const Element* p) { return reinterpret_cast<Block>(_mm512_loadu_si512(p)); }
  static Block load_tail(const Element* p, int64_t count) {
    const auto mask = static_cast<__mmask32>((1ull << count) - 1);
    return reinterpret_cast<Block>(_mm512_maskz_loadu_epi16(mask, p));
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum multiply_add(Block a, const Input* x, Sum sum) {
    return _mm512_dpbf16_ps(sum, a, load(x));
  }
  static float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr DenseLinear::Kernel kKernel{
    {DType::kBFloat16, Vector::kLanes}, Vector::kMaxTokens, dense_rows<Vector>};
const Register<DenseLinear> registered{DType::kBFloat16, isa::kAvx512Bf16, kKernel};
}  // namespace
}  // namespace pysparse
