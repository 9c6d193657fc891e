// Rows of a pruned table, entry by entry: the oracle of the other kernels.
#include "isa/generic.h"
#include "pysparse/embedding.h"

namespace pysparse {
namespace {

template <class T>
void run(const EmbeddingView& table, const Lookup& lookup, void* out) {
  T* target = static_cast<T*>(out);
  for (int64_t i = 0; i < lookup.count; ++i, target += table.dims) {
    const int64_t row = lookup.rows[i];
    const uint8_t* mask = table.mask(row);
    const T* next = static_cast<const T*>(table.values) + table.first_value(row);
    const T* code = static_cast<const T*>(table.codebook) + lookup.fields[i] * table.dims;
    for (int64_t d = 0; d < table.dims; ++d)
      target[d] = mask[d / 8] >> d % 8 & 1 ? *next++ : code[d];
  }
}

constexpr EmbeddingLookup::Kernel kFloat32{run<float>};
constexpr EmbeddingLookup::Kernel kBFloat16{run<BFloat16>};
const Register<EmbeddingLookup> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                                {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
