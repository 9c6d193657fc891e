// Embedding kernels of _cuda: a table is its entries' type, four addresses and two sizes.
#include <pybind11/stl.h>

#include <array>

#include "cuda_bind.h"
#include "embedding.h"

namespace pysparse::cuda {
namespace {

using Addresses = std::array<uintptr_t, 4>;  // values, records, codebook, field_rows
using Sizes = std::array<int64_t, 2>;        // dims, fields
using List = std::array<int64_t, 3>;         // address of the ids, their number, columns
using BagList = std::array<int64_t, 3>;      // addresses of offsets and weights, number of bags

EmbeddingTable table_of(int entry, const Addresses& at, const Sizes& sizes) {
  // Records are read as words of eight bytes.
  if (at[1] % 8) throw std::invalid_argument("records must start at a multiple of 8 bytes");
  return {pointer<const void>(at[0]),    pointer<const uint8_t>(at[1]),
          pointer<const void>(at[2]),    pointer<const int64_t>(at[3]),
          narrow_size(sizes[0], "dims"), narrow_size(sizes[1], "fields"),
          static_cast<Entry>(entry)};
}

EmbeddingIds ids_of(const List& list) {
  return {pointer<const int64_t>(static_cast<uintptr_t>(list[0])), list[1],
          narrow_size(list[2], "columns")};
}

EmbeddingBags bags_of(const BagList& list, bool mean) {
  return {pointer<const int64_t>(static_cast<uintptr_t>(list[0])),
          pointer<const float>(static_cast<uintptr_t>(list[1])), list[2], mean};
}

}  // namespace

void bind_embedding(pybind11::module_& module) {
  module.def("embedding_check",
             [](int entry, const Addresses& at, const Sizes& sizes, const List& ids,
                const BagList& bags, uintptr_t faults, int device, uintptr_t stream) {
               const EmbeddingBags list = bags_of(bags, false);
               check(embedding_check(table_of(entry, at, sizes), ids_of(ids), &list,
                                     pointer<uint64_t>(faults), {device, pointer<void>(stream)}),
                     "embedding_check");
             });
  module.def("embedding_lookup", [](int entry, const Addresses& at, const Sizes& sizes,
                                    const List& ids, uintptr_t out, int device, uintptr_t stream) {
    check(embedding_lookup(table_of(entry, at, sizes), ids_of(ids), pointer<void>(out),
                           {device, pointer<void>(stream)}),
          "embedding_lookup");
  });
  module.def("embedding_bag",
             [](int entry, const Addresses& at, const Sizes& sizes, const List& ids,
                const BagList& bags, bool mean, uintptr_t out, int device, uintptr_t stream) {
               check(embedding_bag(table_of(entry, at, sizes), ids_of(ids), bags_of(bags, mean),
                                   pointer<void>(out), {device, pointer<void>(stream)}),
                     "embedding_bag");
             });
}

}  // namespace pysparse::cuda
