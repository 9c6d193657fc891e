// c += alpha * a b on 256-bit vectors: 6 rows x 16 columns in registers.
#include <algorithm>

#include "isa/avx2.h"
#include "pysparse/cholesky.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/product_rows.h"
namespace pysparse {
namespace {

struct Floats {
  using Vector = __m256;
  static constexpr int kLanes = 8, kVectors = 2, kRows = 6;
  static Vector load(const float* p) { return _mm256_load_ps(p); }
  static void store(float* p, Vector v) { _mm256_store_ps(p, v); }
  static Vector broadcast(float x) { return _mm256_set1_ps(x); }
  static Vector add_product(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ProductAdd::Kernel kKernel{Floats::kLanes * Floats::kVectors, product_rows<Floats>};
const Register<ProductAdd> registered{DType::kFloat32, isa::kAvx2, kKernel};
}  // namespace
}  // namespace pysparse
