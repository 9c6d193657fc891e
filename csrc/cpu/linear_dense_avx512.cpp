// y = W x for a dense weight on 512-bit vectors. bf16 weights and inputs split into even and odd
// columns by a shift and a mask, which makes two fp32 FMAs of 32 products; an input is split once
// for all rows.
#include "isa/avx512.h"
#include "pysparse/linear.h"
#include "simd/store.h"
#include "simd/token_table.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/dense_rows.h"
namespace pysparse {
namespace {

struct Float32 {
  using Element = float;
  using Input = float;
  using Block = __m512;
  using Sum = __m512;
  static constexpr int kLanes = 16, kMaxTokens = 4, kAccumulators = 16;

  static Block load(const Element* p) { return _mm512_loadu_ps(p); }
  static Block load_tail(const Element* p, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum multiply_add(Block a, const Input* x, Sum sum) {
    return _mm512_fmadd_ps(a, _mm512_loadu_ps(x), sum);
  }
  static float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

struct BFloat16Pairs {
  using Element = uint16_t;
  using Input = uint16_t;
  struct Block {
    __m512 even, odd;
  };
  using Sum = __m512;
  static constexpr int kLanes = 32, kMaxTokens = 4, kAccumulators = 16;

  static Block split(__m512i pairs) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, high))};
  }
  static Block load(const Element* p) { return split(_mm512_loadu_si512(p)); }
  static Block load_tail(const Element* p, int64_t count) {
    return split(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1), p));
  }
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum multiply_add(Block a, const Input* x, Sum sum) {
    const Block b = load(x);
    return _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, sum));
  }
  static float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr DenseLinear::Kernel kFloat32{
    {DType::kFloat32, Float32::kLanes}, Float32::kMaxTokens, dense_rows<Float32>};
constexpr DenseLinear::Kernel kBFloat16{{DType::kBFloat16, BFloat16Pairs::kLanes},
                                        BFloat16Pairs::kMaxTokens,
                                        dense_rows<BFloat16Pairs>};
const Register<DenseLinear> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                            {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
