#pragma once
// Zen 4 and later, Sapphire Rapids and later: the bf16 dot product. Zen 5 starts two of them a
// cycle; Sapphire Rapids one in two cycles, which is slower than two fp32 FMAs, so the level must
// first show that it pays.
#include <immintrin.h>

#include "isa/avx512vbmi2.h"
#define PYSPARSE_AVX512BF16 \
  "avx2,fma,f16c,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2,avx512bf16"
namespace pysparse::isa {
bool bf16_dot_beats_fma();  // timed once, some tens of microseconds

inline constexpr IsaLevel kAvx512Bf16{
    "avx512bf16", 40,
    [] { return kAvx512Vbmi2.supported() && __builtin_cpu_supports("avx512bf16"); },
    [] { return bf16_dot_beats_fma(); }};
}  // namespace pysparse::isa
