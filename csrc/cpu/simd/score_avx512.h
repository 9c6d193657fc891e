// Sixteen scores as keys. Included inside an AVX-512 target region.

namespace pysparse {
namespace {

struct Avx512Keys {
  static constexpr int kLanes = 16;
  static constexpr bool kCompress = true;
  using Keys = __m512i;
  struct Scored {
    Keys padded, bounded;  // lanes beyond the row are kLastKey, and INT32_MIN
  };

  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
  static Keys broadcast(int32_t key) { return _mm512_set1_epi32(key); }
  static Keys load_keys(const int32_t* p) { return _mm512_load_si512(p); }
  static void store_keys(int32_t* p, Keys keys) { _mm512_store_si512(p, keys); }
  static Keys min(Keys a, Keys b) { return _mm512_min_epi32(a, b); }
  static Keys max(Keys a, Keys b) { return _mm512_max_epi32(a, b); }
  static int32_t reduce_min(Keys keys) { return _mm512_reduce_min_epi32(keys); }
  static int32_t reduce_max(Keys keys) { return _mm512_reduce_max_epi32(keys); }
  static uint32_t less(Keys a, Keys b) { return _mm512_cmplt_epi32_mask(a, b); }
  static uint32_t equal(Keys a, Keys b) { return _mm512_cmpeq_epi32_mask(a, b); }

  static __mmask16 first(int64_t live) {
    return live >= kLanes ? __mmask16{0xffff} : static_cast<__mmask16>((1u << live) - 1);
  }
  static __m512 widen(const float* p, __mmask16 live) { return _mm512_maskz_loadu_ps(live, p); }
  static __m512 widen(const BFloat16* p, __mmask16 live) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }

  static Keys key_of_scores(__m512 weight, const float* scale, __mmask16 in, int64_t* damaged) {
    __m512 score;
    if (scale) {
      score = _mm512_abs_ps(_mm512_mul_ps(_mm512_abs_ps(weight), _mm512_maskz_loadu_ps(in, scale)));
    } else {
      score = _mm512_add_ps(weight, _mm512_setzero_ps());  // both zeros are one
    }
    const __mmask16 bad = _mm512_cmp_ps_mask(score, score, _CMP_UNORD_Q);
    if (__builtin_expect(bad != 0, 0)) *damaged += __builtin_popcount(bad);
    const __m512i bits = _mm512_castps_si512(score);
    if (scale) return bits;  // no sign: in order as they are
    const __m512i flip =
        _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff));
    return _mm512_xor_si512(bits, flip);
  }
  template <class T>
  static Scored score(const T* weight, const float* scale, int64_t live, int64_t* damaged) {
    const __mmask16 in = first(live);
    const Keys keys = key_of_scores(widen(weight, in), scale, in, damaged);
    if (__builtin_expect(live >= kLanes, 1)) return {keys, keys};
    return {_mm512_mask_mov_epi32(broadcast(kLastKey), in, keys),
            _mm512_mask_mov_epi32(broadcast(INT32_MIN), in, keys)};
  }

  // Moves the keys in [low, high] to `pool`, padded by kLastKey; returns their number, rounded up
  // to whole vectors. `pool` may be `keys`.
  static int64_t compress(const int32_t* keys, int64_t size, int32_t low, int32_t high,
                          int32_t* pool) {
    const Keys floor = broadcast(low), ceiling = broadcast(high);
    int64_t kept = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
      const Keys row = load_keys(keys + i);
      const __mmask16 in =
          _mm512_mask_cmple_epi32_mask(_mm512_cmpge_epi32_mask(row, floor), row, ceiling);
      // To a register and then whole: a compressing store is slow on some CPUs.
      _mm512_storeu_si512(pool + kept, _mm512_maskz_compress_epi32(in, row));
      kept += __builtin_popcount(in);
    }
    _mm512_storeu_si512(pool + kept, broadcast(kLastKey));
    return (kept + kLanes - 1) / kLanes * kLanes;
  }

  static void store_kept(float* target, const float* weight, __mmask16 keep, __mmask16 in) {
    _mm512_mask_storeu_ps(target, in,
                          _mm512_maskz_loadu_ps(static_cast<__mmask16>(keep & in), weight));
  }
  static void store_kept(BFloat16* target, const BFloat16* weight, __mmask16 keep, __mmask16 in) {
    _mm256_mask_storeu_epi16(target, in,
                             _mm256_maskz_loadu_epi16(static_cast<__mmask16>(keep & in), weight));
  }

  template <class T>
  static void write(uint32_t kept, const T* weight, int64_t live, uint8_t* keep, T* pruned) {
    const __mmask16 in = first(live), mask = static_cast<__mmask16>(kept);
    _mm_mask_storeu_epi8(keep, in, _mm_maskz_set1_epi8(mask, 1));
    if (pruned) store_kept(pruned, weight, mask, in);
  }
};

}  // namespace
}  // namespace pysparse
