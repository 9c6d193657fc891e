#pragma once
// Skylake-X and later, Zen 4 and later: 512-bit vectors, masks, expand of 32-bit lanes.
#include <immintrin.h>

#include "isa/avx2.h"
#define PYSPARSE_AVX512 "avx2,fma,f16c,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq"
namespace pysparse::isa {
inline constexpr IsaLevel kAvx512{"avx512", 20, [] {
                                    return kAvx2.supported() && __builtin_cpu_supports("avx512f") &&
                                           __builtin_cpu_supports("avx512bw") &&
                                           __builtin_cpu_supports("avx512vl") &&
                                           __builtin_cpu_supports("avx512dq");
                                  }};
}  // namespace pysparse::isa
