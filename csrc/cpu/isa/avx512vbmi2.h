#pragma once
// Ice Lake and later, Zen 4 and later: expand of 16-bit lanes.
#include <immintrin.h>

#include "isa/avx512.h"
#define PYSPARSE_AVX512VBMI2 \
  "avx2,fma,f16c,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi2"
namespace pysparse::isa {
inline constexpr IsaLevel kAvx512Vbmi2{
    "avx512vbmi2", 30, [] { return kAvx512.supported() && __builtin_cpu_supports("avx512vbmi2"); }};
}  // namespace pysparse::isa
