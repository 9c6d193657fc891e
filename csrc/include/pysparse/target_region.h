#pragma once
// Compiles what lies between BEGIN and END for one instruction set; headers that came before stay
// at the baseline. Include every system header first, and close the region before the registration
// object.
#define PYSPARSE_STRINGIFY_(x) #x
#define PYSPARSE_STRINGIFY(x) PYSPARSE_STRINGIFY_(x)
#if defined(__clang__)
#define PYSPARSE_TARGET_BEGIN(isa) \
  _Pragma(                         \
      PYSPARSE_STRINGIFY(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define PYSPARSE_TARGET_END _Pragma("clang attribute pop")
#else
#define PYSPARSE_TARGET_BEGIN(isa) \
  _Pragma("GCC push_options") _Pragma(PYSPARSE_STRINGIFY(GCC target(isa)))
#define PYSPARSE_TARGET_END _Pragma("GCC pop_options")
#endif
