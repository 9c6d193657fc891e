#include <pybind11/stl.h>

#include <array>

#include "bind.h"
#include "pysparse/embedding.h"

namespace pysparse {
namespace {

using Arrays = std::array<uintptr_t, 4>;  // values, records, codebook, field_rows
using Sizes = std::array<int64_t, 3>;     // rows, dims, fields

EmbeddingView table(int dtype, const Arrays& arrays, const Sizes& sizes) {
  return {pointer<const void>(arrays[0]),
          pointer<const uint8_t>(arrays[1]),
          pointer<const void>(arrays[2]),
          pointer<const int64_t>(arrays[3]),
          sizes[0],
          sizes[1],
          sizes[2],
          dtype_of(dtype)};
}

}  // namespace

void bind_embedding(pybind11::module_& module) {
  module.attr("EMBEDDING_GROUP") = kEmbeddingGroup;
  module.def(
      "embedding_pack",
      [](uintptr_t bitmask, int64_t rows, int64_t dims, uintptr_t records) {
        return embedding_pack(pointer<const uint8_t>(bitmask), rows, dims,
                              pointer<uint8_t>(records));
      },
      ReleaseGil());
  module.def(
      "embedding_lookup",
      [](int dtype, const Arrays& arrays, const Sizes& sizes, uintptr_t ids, int64_t count,
         int64_t columns, uintptr_t out) {
        embedding_lookup(table(dtype, arrays, sizes), {pointer<const int64_t>(ids), count, columns},
                         pointer<void>(out));
      },
      ReleaseGil());
  module.def(
      "embedding_bag",
      [](int dtype, const Arrays& arrays, const Sizes& sizes, uintptr_t ids, int64_t count,
         int64_t columns, uintptr_t offsets, uintptr_t weights, int64_t bags, bool mean,
         uintptr_t out) {
        embedding_bag(table(dtype, arrays, sizes), {pointer<const int64_t>(ids), count, columns},
                      {pointer<const int64_t>(offsets), pointer<const float>(weights), bags, mean},
                      pointer<void>(out));
      },
      ReleaseGil());
}

}  // namespace pysparse
