// The k smallest scores of a row: halve the interval that holds the threshold, and after every two
// halvings keep only the keys inside, so that all later passes are short.
#include <algorithm>

#include "isa/avx512.h"
#include "pysparse/select.h"

PYSPARSE_TARGET_BEGIN(PYSPARSE_AVX512)
#include "simd/score_avx512.h"
#include "simd/select_rows.h"
PYSPARSE_TARGET_END

namespace pysparse {
namespace {
constexpr RowSelect::Kernel kFloat32{select_rows_of<Avx512Keys, float>};
constexpr RowSelect::Kernel kBFloat16{select_rows_of<Avx512Keys, BFloat16>};
const Register<RowSelect> registered[] = {{DType::kFloat32, isa::kAvx512, kFloat32},
                                          {DType::kBFloat16, isa::kAvx512, kBFloat16}};
}  // namespace
}  // namespace pysparse
