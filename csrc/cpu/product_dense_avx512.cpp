// c += alpha * a b on 512-bit vectors: 6 rows x 64 columns in registers.
#include <algorithm>

#include "isa/avx512.h"
#include "pysparse/cholesky.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/product_rows.h"
namespace pysparse {
namespace {

struct Floats {
  using Vector = __m512;
  static constexpr int kLanes = 16, kVectors = 4, kRows = 6;
  static Vector load(const float* p) { return _mm512_load_ps(p); }
  static void store(float* p, Vector v) { _mm512_store_ps(p, v); }
  static Vector broadcast(float x) { return _mm512_set1_ps(x); }
  static Vector add_product(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ProductAdd::Kernel kKernel{Floats::kLanes * Floats::kVectors, product_rows<Floats>};
const Register<ProductAdd> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
