// Times one vdpbf16ps against the two fp32 FMAs that do the same products.
#include "isa/avx512bf16.h"

#include <algorithm>
#include <chrono>

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512BF16)
namespace pysparse {
namespace {

constexpr int kRounds = 500;
using Clock = std::chrono::steady_clock;

// Twelve independent accumulators hide either instruction's latency.
#define PYSPARSE_REPEAT_12(op) \
  op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)
#define PYSPARSE_DOT(i) "vdpbf16ps %%zmm12, %%zmm12, %%zmm" #i "\n"
#define PYSPARSE_FMA(i) "vfmadd231ps %%zmm12, %%zmm12, %%zmm" #i "\n"
#define PYSPARSE_CLOBBERS                                                                  \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", \
      "zmm11", "zmm12"

Clock::duration time_dot() {
  const auto start = Clock::now();
  for (int i = 0; i < kRounds; ++i)
    asm volatile("vpxord %%zmm12, %%zmm12, %%zmm12\n" PYSPARSE_REPEAT_12(PYSPARSE_DOT)::
                     : PYSPARSE_CLOBBERS);
  return Clock::now() - start;
}

Clock::duration time_two_fmas() {
  const auto start = Clock::now();
  for (int i = 0; i < kRounds; ++i)
    asm volatile("vpxord %%zmm12, %%zmm12, %%zmm12\n" PYSPARSE_REPEAT_12(PYSPARSE_FMA)
                     PYSPARSE_REPEAT_12(PYSPARSE_FMA)::
                         : PYSPARSE_CLOBBERS);
  return Clock::now() - start;
}

}  // namespace
}  // namespace pysparse
PYSPARSE_TARGET_END

namespace pysparse::isa {

bool bf16_dot_beats_fma() {
  static const bool beats = [] {
    auto dot = Clock::duration::max(), fmas = Clock::duration::max();
    for (int i = 0; i < 9; ++i) {  // the fastest of several: an interrupt only ever adds time
      dot = std::min(dot, time_dot());
      fmas = std::min(fmas, time_two_fmas());
    }
    return dot <= fmas;
  }();
  return beats;
}

}  // namespace pysparse::isa
