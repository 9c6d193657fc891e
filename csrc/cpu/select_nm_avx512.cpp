// n of every 4, 8 or 16: each key is compared with its group rotated by 1, 2, ..., and counts who
// goes before it.
#include <algorithm>

#include "isa/avx512.h"
#include "pysparse/select.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/score_avx512.h"
namespace pysparse {
namespace {

constexpr int kPrefetchBytes = 3072;  // ahead: memory's latency at a core's share of its bandwidth

template <int kGroup>
struct Rotations {
  __m512i source[kGroup];
  __mmask16 lower[kGroup];  // lanes whose partner lies in a lower column

  Rotations() {
    for (int s = 1; s < kGroup; ++s) {
      alignas(64) int32_t from[16];
      lower[s] = 0;
      for (int lane = 0; lane < 16; ++lane) {
        const int place = lane % kGroup, partner = (place + s) % kGroup;
        from[lane] = lane - place + partner;
        if (partner < place) lower[s] = static_cast<__mmask16>(lower[s] | 1 << lane);
      }
      source[s] = _mm512_load_si512(from);
    }
  }
};

// The lanes of which at least `count` of before[1], ..., before[kGroup - 1] hold.
template <int kGroup>
inline uint32_t at_least(const __mmask16* before, int count) {
  if constexpr (kGroup == 4) {  // in mask registers: one, two or all of three
    const uint32_t a = before[1], b = before[2], c = before[3];
    return count == 2 ? (a & b) | (c & (a | b)) : count == 1 ? a | b | c : a & b & c;
  } else {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int s = 1; s < kGroup; ++s) sum = _mm512_mask_add_epi32(sum, before[s], sum, one);
    return _mm512_cmpge_epi32_mask(sum, _mm512_set1_epi32(count));
  }
}

template <class T, int kGroup>
int64_t run_group(const ScoredView& view, int n, int64_t begin, int64_t end, const Selection& out) {
  using V = Avx512Keys;
  const Rotations<kGroup> rotations;
  const int64_t whole = view.cols / kGroup * kGroup;
  const __m512i one = _mm512_set1_epi32(1);
  int64_t damaged = 0;
  for (int64_t r = begin; r < end; ++r) {
    const T* weight = static_cast<const T*>(view.weight) + r * view.cols;
    for (int64_t c = 0; c < view.cols; c += V::kLanes) {
      const int64_t live = std::min<int64_t>(V::kLanes, view.cols - c);
      V::prefetch(reinterpret_cast<const char*>(weight + c) + kPrefetchBytes);
      const __m512i x =
          V::score(weight + c, view.scale ? view.scale + c : nullptr, live, &damaged).padded;
      __mmask16 before[kGroup];
#pragma GCC unroll 16
      for (int s = 1; s < kGroup; ++s) {
        const __m512i y = _mm512_permutexvar_epi32(rotations.source[s], x);
        // y < x, or equal and of a lower column: y - 1 < x there, and no key is the least number.
        const __m512i earlier = _mm512_mask_sub_epi32(y, rotations.lower[s], y, one);
        before[s] = _mm512_cmplt_epi32_mask(earlier, x);
      }
      const uint32_t kept = at_least<kGroup>(before, kGroup - n);
      const int64_t grouped = std::max<int64_t>(0, std::min<int64_t>(live, whole - c));
      V::write(kept | ~0u << grouped, weight + c, live, out.keep + r * view.cols + c,
               out.pruned ? static_cast<T*>(out.pruned) + r * view.cols + c : nullptr);
    }
  }
  return damaged;
}

template <class T>
int64_t run(const ScoredView& view, int n, int m, int64_t begin, int64_t end,
            const Selection& out) {
  if (m == 4) return run_group<T, 4>(view, n, begin, end, out);
  if (m == 8) return run_group<T, 8>(view, n, begin, end, out);
  return run_group<T, 16>(view, n, begin, end, out);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
bool covers(int m) { return m == 4 || m == 8 || m == 16; }
constexpr NmSelect::Kernel kFloat32{covers, run<float>};
constexpr NmSelect::Kernel kBFloat16{covers, run<BFloat16>};
const Register<NmSelect> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                         {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
