// Softmax attention of 64 rows in fp32 FMAs; bf16 values are widened when they are packed.
#include <algorithm>
#include <cmath>

#include "isa/avx512.h"
#include "pysparse/attention.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/attention_avx512.h"
#include "simd/attention_tile.h"
namespace pysparse {
namespace {

template <class Value>
struct Floats : Lanes512 {
  using T = Value;
  static constexpr int kKeysPerWord = 1;

  static Vector dot(Words a, Words b, Vector c) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), c);
  }
  static Vector exp2(Vector x) { return exp2_of<5>(x); }
  static Words row_words(const float* p, int64_t count) { return float_words(p, count); }
  static Words row_words(const BFloat16* p, int64_t count) {
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(count), p)), 16);
  }
  using Lanes512::store_row;
  static void store_row(BFloat16* p, Vector v, int64_t count) {
    alignas(64) float values[kLanes];
    store(values, v);
    for (int64_t i = 0; i < std::min<int64_t>(count, kLanes); ++i) assign(p[i], values[i]);
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
template <class T>
constexpr AttentionTile::Kernel kKernel = Tile<Floats<T>>::kernel();
const Register<AttentionTile> registered[] = {{DType::kFloat32, isa::kAvx512, kKernel<float>},
                                              {DType::kBFloat16, isa::kAvx512, kKernel<BFloat16>}};
}  // namespace
}  // namespace pysparse
