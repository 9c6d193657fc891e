// The k smallest scores of a row on 256-bit vectors: a count below a pivot is a pass over a row in
// the first-level cache, and some fifteen of them find the threshold.
#include <algorithm>
#include <cstring>

#include "isa/avx2.h"
#include "pysparse/select.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX2)
#include "simd/select_rows.h"
namespace pysparse {
namespace {

struct Avx2Keys {
  static constexpr int kLanes = 8;
  static constexpr bool kCompress = false;
  using Keys = __m256i;
  struct Scored {
    Keys padded, bounded;
  };

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static Keys broadcast(int32_t key) { return _mm256_set1_epi32(key); }
  static Keys load_keys(const int32_t* p) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
  }
  static void store_keys(int32_t* p, Keys keys) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), keys);
  }
  static Keys min(Keys a, Keys b) { return _mm256_min_epi32(a, b); }
  static Keys max(Keys a, Keys b) { return _mm256_max_epi32(a, b); }
  static uint32_t bits(Keys mask) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
  }
  static uint32_t less(Keys a, Keys b) { return bits(_mm256_cmpgt_epi32(b, a)); }
  static uint32_t equal(Keys a, Keys b) { return bits(_mm256_cmpeq_epi32(a, b)); }
  static int32_t reduce_min(Keys keys) {
    alignas(32) int32_t lanes[kLanes];
    store_keys(lanes, keys);
    return *std::min_element(lanes, lanes + kLanes);
  }
  static int32_t reduce_max(Keys keys) {
    alignas(32) int32_t lanes[kLanes];
    store_keys(lanes, keys);
    return *std::max_element(lanes, lanes + kLanes);
  }

  static __m256 widen(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 widen(const BFloat16* p) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(packed), 16));
  }

  template <class T>
  static Scored score(const T* weight, const float* scale, int64_t live, int64_t* damaged) {
    if (live < kLanes) return score_tail(weight, scale, live, damaged);
    const Keys keys = score_eight(widen(weight), scale, damaged);
    return {keys, keys};
  }
  template <class T>
  static Scored score_tail(const T* weight, const float* scale, int64_t live, int64_t* damaged) {
    T weights[kLanes] = {};
    float scales[kLanes] = {};
    std::copy(weight, weight + live, weights);
    if (scale) std::copy(scale, scale + live, scales);
    alignas(32) int32_t lanes[kLanes];
    store_keys(lanes, score_eight(widen(weights), scale ? scales : nullptr, damaged));
    std::fill(lanes + live, lanes + kLanes, kLastKey);
    const Keys padded = load_keys(lanes);
    std::fill(lanes + live, lanes + kLanes, INT32_MIN);
    return {padded, load_keys(lanes)};
  }
  static Keys score_eight(__m256 score, const float* scale, int64_t* damaged) {
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    if (scale) {
      score = _mm256_mul_ps(_mm256_and_ps(score, no_sign), _mm256_loadu_ps(scale));
      score = _mm256_and_ps(score, no_sign);
    } else {
      score = _mm256_add_ps(score, _mm256_setzero_ps());  // both zeros are one
    }
    const int bad = _mm256_movemask_ps(_mm256_cmp_ps(score, score, _CMP_UNORD_Q));
    *damaged += __builtin_popcount(static_cast<unsigned>(bad));
    const __m256i value = _mm256_castps_si256(score);
    return _mm256_xor_si256(
        value, _mm256_and_si256(_mm256_srai_epi32(value, 31), _mm256_set1_epi32(0x7fffffff)));
  }

  template <class T>
  static void write(uint32_t kept, const T* weight, int64_t live, uint8_t* keep, T* pruned) {
    const uint64_t bytes = _pdep_u64(kept & 0xff, 0x0101010101010101u);
    std::memcpy(keep, &bytes, static_cast<size_t>(live));
    if (!pruned) return;
    for (int64_t i = 0; i < live; ++i) pruned[i] = kept >> i & 1 ? weight[i] : T{};
  }
};

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr RowSelect::Kernel kFloat32{select_rows_of<Avx2Keys, float>};
constexpr RowSelect::Kernel kBFloat16{select_rows_of<Avx2Keys, BFloat16>};
const Register<RowSelect> registered[] = {{DType::kFloat32, isa::kAvx2, kFloat32},
                                          {DType::kBFloat16, isa::kAvx2, kBFloat16}};
}  // namespace
}  // namespace pysparse
