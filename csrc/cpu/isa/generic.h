#pragma once
#include "pysparse/kernel_table.h"
namespace pysparse::isa {
inline constexpr IsaLevel kGeneric{"generic", 0, [] { return true; }};
}  // namespace pysparse::isa
