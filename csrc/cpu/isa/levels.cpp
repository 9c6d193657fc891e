// The ISA levels, lowest first: the only list of them.
#include "isa/generic.h"
#if defined(__x86_64__)
#include "isa/avx512bf16.h"
#include "isa/avx512vnni.h"
#endif

namespace pysparse {
static const RegisterIsa generic{isa::kGeneric};
#if defined(__x86_64__)
static const RegisterIsa avx2{isa::kAvx2};
static const RegisterIsa avx512{isa::kAvx512};
static const RegisterIsa avx512vbmi2{isa::kAvx512Vbmi2};
static const RegisterIsa avx512vnni{isa::kAvx512Vnni};
static const RegisterIsa avx512bf16{isa::kAvx512Bf16};
#endif
}  // namespace pysparse
