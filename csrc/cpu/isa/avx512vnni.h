#pragma once
// Ice Lake and later, Zen 4 and later: dot products of bytes, and permutes of bytes.
#include <immintrin.h>

#include "isa/avx512vbmi2.h"
#define PYSPARSE_AVX512VNNI \
  "avx2,fma,f16c,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512vnni"
namespace pysparse::isa {
inline constexpr IsaLevel kAvx512Vnni{"avx512vnni", 35, [] {
                                        return kAvx512Vbmi2.supported() &&
                                               __builtin_cpu_supports("avx512vbmi") &&
                                               __builtin_cpu_supports("avx512vnni");
                                      }};
}  // namespace pysparse::isa
