#pragma once
// Haswell, Zen: 256-bit integer and FMA.
#include <immintrin.h>

#include "pysparse/kernel_table.h"
#include "pysparse/target_region.h"
#define PYSPARSE_AVX2 "avx2,fma,f16c,bmi2,popcnt"
namespace pysparse::isa {
inline constexpr IsaLevel kAvx2{"avx2", 10, [] {
                                  return __builtin_cpu_supports("avx2") &&
                                         __builtin_cpu_supports("fma") &&
                                         __builtin_cpu_supports("bmi2") &&
                                         __builtin_cpu_supports("popcnt");
                                }};
}  // namespace pysparse::isa
