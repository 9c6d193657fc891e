// Marginals to whole numbers, eight at a time; both conversions round to nearest even.
#include <algorithm>

#include "isa/avx512.h"
#include "pysparse/shapley_entries.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
namespace pysparse {
namespace {

inline void add_eight(int64_t* total, __mmask8 live, __m512i amount) {
  _mm512_mask_storeu_epi64(total, live,
                           _mm512_add_epi64(_mm512_maskz_loadu_epi64(live, total), amount));
}

inline __m512d load_eight(const float* from, __mmask8 live) {
  return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(live, from));
}

template <bool kAgain>
void add_rows(const MarginalTile& tile, const EntryTotals& totals, RowRange mine) {
  const int width = padded_width(tile.cols);
  const __m512d sum_scale = _mm512_set1_pd(kSumScale), square_scale = _mm512_set1_pd(kSquareScale);
  const int64_t count = tile.samples * tile.fields;
  constexpr int64_t kAhead = 24;  // rows; a total's line comes from memory in a large table
  for (int64_t i = 0; i < count; ++i) {
    const int32_t ahead = tile.ids[std::min(i + kAhead, count - 1)];
    if (mine.has(ahead)) {
      // Another core has written many of them.
      for (int k = 0; k < width; k += 16)
        _mm_prefetch(reinterpret_cast<const char*>(tile.marginals + (i + kAhead) * width + k),
                     _MM_HINT_T0);
      for (int k = 0; k < tile.cols; k += 8) {
        _mm_prefetch(reinterpret_cast<const char*>(totals.sums + int64_t{ahead} * tile.cols + k),
                     _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(totals.squares + int64_t{ahead} * tile.cols + k),
                     _MM_HINT_T0);
      }
    }
    if (!mine.has(tile.ids[i])) continue;
    const int64_t row = int64_t{tile.ids[i]} * tile.cols;
    for (int k = 0; k < tile.cols; k += 8) {
      const auto live = static_cast<__mmask8>((1u << std::min(8, tile.cols - k)) - 1);
      const __m512d x = load_eight(tile.marginals + i * width + k, live);
      __m512i sum = _mm512_cvtpd_epi64(_mm512_mul_pd(x, sum_scale));
      __m512d spread = x;
      if constexpr (kAgain) {
        const __m512d y = load_eight(tile.again + i * width + k, live);
        sum = _mm512_add_epi64(sum, _mm512_cvtpd_epi64(_mm512_mul_pd(y, sum_scale)));
        spread = _mm512_sub_pd(x, y);
      }
      add_eight(totals.sums + row + k, live, sum);
      const __m512d square = _mm512_mul_pd(_mm512_mul_pd(spread, spread), square_scale);
      add_eight(totals.squares + row + k, live, _mm512_cvtpd_epi64(square));
    }
  }
}

void run(const MarginalTile& tile, const EntryTotals& totals, RowRange mine) {
  (tile.again ? add_rows<true> : add_rows<false>)(tile, totals, mine);
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr ShapleyAdd::Kernel kKernel{run};
const Register<ShapleyAdd> registered{DType::kFloat32, isa::kAvx512, kKernel};
}  // namespace
}  // namespace pysparse
