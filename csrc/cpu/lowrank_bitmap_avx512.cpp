// Rows of M * (W + s B A): 16 columns at a time, up to 8 rows of A against one kept-weight vector;
// packed weights are spread over their lanes by the mask bits, gradients gathered by them.
#include <algorithm>

#include "isa/avx512.h"
#include "pysparse/lowrank.h"
#include "simd/mask_row.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
namespace pysparse {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kRanks = 8;  // sums in registers, beside a factor of A and one of its gradient each

__mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1u << count) - 1);
}

// bf16 lies in the upper half of a float; rounding to nearest even is an addition below.
struct Halves {
  static __m512 load(__mmask16 live, const void* row, int64_t col) {
    const auto* p = static_cast<const uint16_t*>(row) + col;
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  }
  static void store(__mmask16 live, void* row, int64_t col, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_set1_epi32(rounded, nan, 0x7fc0);  // must not round up to infinity
    _mm256_mask_storeu_epi16(static_cast<uint16_t*>(row) + col, live,
                             _mm512_cvtepi32_epi16(rounded));
  }
  static constexpr int64_t kBytes = 2;
};

struct Floats {
  static __m512 load(__mmask16 live, const void* row, int64_t col) {
    return _mm512_maskz_loadu_ps(live, static_cast<const float*>(row) + col);
  }
  static void store(__mmask16 live, void* row, int64_t col, __m512 value) {
    _mm512_mask_storeu_ps(static_cast<float*>(row) + col, live, value);
  }
  static constexpr int64_t kBytes = 4;
};

template <class T>
void expand(const LowRankView& view, int64_t begin, int64_t end, void* tile) {
  const int64_t cols = view.mask.cols;
  const __m512 scale = _mm512_set1_ps(view.scale);
  for (int64_t r = begin; r < end; ++r) {
    const MaskRow bits(view.mask, r);
    const float* up = view.up + r * view.rank;
    int64_t next = view.mask.row_offsets[r];
    void* row = static_cast<char*>(tile) + (r - begin) * cols * T::kBytes;
    for (int64_t c = 0; c < cols; c += kLanes) {
      const __mmask16 live = lanes(cols - c), kept = static_cast<__mmask16>(bits.sixteen(c));
      __m512 sum = _mm512_setzero_ps();
      if (kept)
        for (int64_t k = 0; k < view.rank; ++k)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(up[k]),
                                _mm512_maskz_loadu_ps(live, view.down + k * cols + c), sum);
      const int count = __builtin_popcount(kept);
      __m512 weight = _mm512_setzero_ps();
      if (view.values)  // a load that stops where the kept values do: nothing pads them
        weight =
            _mm512_maskz_expand_ps(kept, _mm512_maskz_loadu_ps(lanes(count), view.values + next));
      next += count;
      T::store(live, row, c, _mm512_maskz_fmadd_ps(kept, scale, sum, weight));
    }
  }
}

// Ranks [k, k + n) of one row: n sums over the columns, and n rows of A's gradient.
template <class T, int n>
void contract_ranks(const LowRankView& view, const void* row, const MaskRow& bits, int64_t r,
                    int64_t k, int64_t first, int64_t last, const LowRankGradient& out,
                    float* up_sums) {
  const int64_t cols = view.mask.cols;
  __m512 sums[n], factors[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) {
    sums[i] = _mm512_setzero_ps();
    factors[i] = _mm512_set1_ps(view.scale * view.up[r * view.rank + k + i]);
  }
  for (int64_t c = first; c < last; c += kLanes) {
    const __mmask16 kept = static_cast<__mmask16>(bits.sixteen(c)) & lanes(last - c);
    if (!kept) continue;
    const __m512 gradient = T::load(kept, row, c);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      float* down = out.down + (k + i) * cols + c;
      const __m512 a = _mm512_maskz_loadu_ps(kept, view.down + (k + i) * cols + c);
      sums[i] = _mm512_fmadd_ps(gradient, a, sums[i]);
      _mm512_mask_storeu_ps(
          down, kept, _mm512_fmadd_ps(factors[i], gradient, _mm512_maskz_loadu_ps(kept, down)));
    }
  }
  for (int i = 0; i < n; ++i) up_sums[k + i] = view.scale * _mm512_reduce_add_ps(sums[i]);
}

template <class T>
void gather_values(const void* row, const MaskRow& bits, int64_t first, int64_t last,
                   float* values) {
  for (int64_t c = first; c < last; c += kLanes) {
    const __mmask16 kept = static_cast<__mmask16>(bits.sixteen(c)) & lanes(last - c);
    const int count = __builtin_popcount(kept);
    _mm512_mask_storeu_ps(values, lanes(count),
                          _mm512_maskz_compress_ps(kept, T::load(kept, row, c)));
    values += count;
  }
}

template <class T>
void contract(const LowRankView& view, const void* gradient, int64_t begin, int64_t end,
              int64_t first, int64_t last, const LowRankGradient& out) {
  for (int64_t r = begin; r < end; ++r) {
    const void* row = static_cast<const char*>(gradient) + (r - begin) * view.mask.cols * T::kBytes;
    const MaskRow bits(view.mask, r);
    float* up_sums = out.up_sums + (r - begin) * view.rank;
    int64_t k = 0;
    for (; k + kRanks <= view.rank; k += kRanks)
      contract_ranks<T, kRanks>(view, row, bits, r, k, first, last, out, up_sums);
    for (; k < view.rank; ++k)
      contract_ranks<T, 1>(view, row, bits, r, k, first, last, out, up_sums);
    if (out.values)
      gather_values<T>(row, bits, first, last,
                       out.values + view.mask.row_offsets[r] + bits.kept_before(first));
  }
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr LowRank::Kernel kFloat{expand<Floats>, contract<Floats>};
constexpr LowRank::Kernel kHalf{expand<Halves>, contract<Halves>};
const Register<LowRank> registered_float{DType::kFloat32, isa::kAvx512, kFloat};
const Register<LowRank> registered_half{DType::kBFloat16, isa::kAvx512, kHalf};
}  // namespace
}  // namespace pysparse
