#pragma once
// Lookups in a pruned embedding table (csrc/include/pysparse/embedding.h has the format). Plain
// pointers and sizes as in api.h; no allocation, no synchronisation.
#include "api.h"
#include "entry.h"

namespace pysparse::cuda {

struct EmbeddingTable {
  const void* values;         // in order of rows
  const uint8_t* records;     // by 8 rows: the index of their first value, then their masks
  const void* codebook;       // [fields][dims]
  const int64_t* field_rows;  // [fields + 1], in device memory: where each field's rows begin
  int dims, fields;
  Entry entry;
};

// With `columns` fields, id i is counted from the first row of field i % columns; with 0 it is a
// row of the table.
struct EmbeddingIds {
  const int64_t* values;
  int64_t count;
  int columns;
};

// Bag b holds ids [offsets[b], offsets[b + 1]), each times its weight where there are weights.
struct EmbeddingBags {
  const int64_t* offsets;  // [count + 1]
  const float* weights;    // [ids] or null
  int64_t count;
  bool mean;
};

// The lowest position of an id outside its field or the table, and of a bag that does not lie
// within the ids, are written to faults[0] and faults[1], both all ones before. bags may be null.
int embedding_check(const EmbeddingTable& table, const EmbeddingIds& ids, const EmbeddingBags* bags,
                    uint64_t* faults, const Target& target);

// out [ids][dims]. An id outside reads nothing: its row is NaN.
int embedding_lookup(const EmbeddingTable& table, const EmbeddingIds& ids, void* out,
                     const Target& target);

// out [bags][dims]: float32 sums in the order of the ids, rounded once; an empty bag is zero. A bag
// with an id outside, or outside the ids, is NaN.
int embedding_bag(const EmbeddingTable& table, const EmbeddingIds& ids, const EmbeddingBags& bags,
                  void* out, const Target& target);

}  // namespace pysparse::cuda
