// Rows of a pruned table, entry by entry: the oracle of the other kernels.
#include <cmath>

#include "isa/generic.h"
#include "pysparse/embedding.h"

namespace pysparse {
namespace {

// Calls take(entry, column) for the entries of row i of a lookup.
template <class T, class Take>
void read_row(const EmbeddingView& table, const Lookup& lookup, int64_t i, const Take& take) {
  const int64_t row = lookup.rows[i];
  const uint8_t* mask = table.mask(row);
  const T* next = static_cast<const T*>(table.values) + table.first_value(row);
  const T* code = static_cast<const T*>(table.codebook) + lookup.fields[i] * table.dims;
  for (int64_t d = 0; d < table.dims; ++d) take(mask[d / 8] >> d % 8 & 1 ? *next++ : code[d], d);
}

template <class T>
void run(const EmbeddingView& table, const Lookup& lookup, void* out) {
  for (int64_t i = 0; i < lookup.count; ++i) {
    T* target = static_cast<T*>(out) + i * table.dims;
    read_row<T>(table, lookup, i, [&](T entry, int64_t d) { target[d] = entry; });
  }
}

template <class T>
void add(const EmbeddingView& table, const Lookup& lookup, const BagRows& to) {
  for (int64_t i = 0; i < lookup.count; ++i) {
    float* sum = to.sums + to.bags[i] * table.dims;
    if (!to.weights) {
      read_row<T>(table, lookup, i, [&](T entry, int64_t d) { sum[d] += to_float(entry); });
      continue;
    }
    // Rounded once, as the other kernels round it.
    read_row<T>(table, lookup, i, [&, weight = to.weights[i]](T entry, int64_t d) {
      sum[d] = std::fma(weight, to_float(entry), sum[d]);
    });
  }
}

constexpr EmbeddingLookup::Kernel kFloat32{run<float>, add<float>};
constexpr EmbeddingLookup::Kernel kBFloat16{run<BFloat16>, add<BFloat16>};
const Register<EmbeddingLookup> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                                {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
