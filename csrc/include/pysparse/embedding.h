#pragma once
// Lookups in an embedding table of which a bitmap says what is stored; what is not comes from the
// codebook of the row's field (or is zero). Memory goes with the values kept: a row has its mask
// and an eighth of an offset beside them.
#include <cstring>

#include "pysparse/kernel_table.h"
#include "pysparse/views.h"

namespace pysparse {

inline constexpr int64_t kEmbeddingGroup = 8;  // rows that share an offset

// A record for each group of rows: the index of its first value, then the rows' masks, row by row,
// column j of a row being bit j % 8 of its byte j / 8. One record is a cache line or less up to 56
// columns, so that a lookup costs two: the record's and the values'.
struct EmbeddingView {
  const void* values;         // in order of rows, padded by kValuePadding
  const uint8_t* records;     // [groups()][record_bytes()]
  const void* codebook;       // [fields][dims]
  const int64_t* field_rows;  // [fields + 1]: where each field's rows begin
  int64_t rows, dims, fields;
  DType dtype;

  int64_t groups() const { return (rows + kEmbeddingGroup - 1) / kEmbeddingGroup; }
  int64_t row_bytes() const { return mask_bytes(dims); }
  int64_t record_bytes() const { return 8 + kEmbeddingGroup * row_bytes(); }

  const uint8_t* record(int64_t row) const {
    return records + row / kEmbeddingGroup * record_bytes();
  }
  const uint8_t* mask(int64_t row) const {
    return record(row) + 8 + row % kEmbeddingGroup * row_bytes();
  }
  // The index of a row's first value: its group's, and the bits of the rows between.
  int64_t first_value(int64_t row) const {
    const uint8_t* words = record(row);
    int64_t first;
    std::memcpy(&first, words, 8);
    int64_t bytes = row % kEmbeddingGroup * row_bytes();
    for (words += 8; bytes > 0; words += 8, bytes -= 8) {
      uint64_t word;
      std::memcpy(&word, words, 8);
      if (bytes < 8) word &= (uint64_t{1} << 8 * bytes) - 1;
      first += __builtin_popcountll(word);
    }
    return first;
  }
};

// Which rows, and which codebook entry stands in for what they lack.
struct Lookup {
  const int64_t* rows;
  const int32_t* fields;
  int64_t count;
};

// Which bag each row of a lookup goes to, and times what.
struct BagRows {
  const int32_t* bags;   // [count], rising
  const float* weights;  // [count], or null for one
  float* sums;           // [bags][dims], added to
};

struct EmbeddingLookup {
  static constexpr const char* op = "embedding";
  static constexpr const char* format = "bitmap";
  struct Kernel {
    void (*run)(const EmbeddingView& table, const Lookup& lookup, void* out);  // out [count][dims]
    void (*add)(const EmbeddingView& table, const Lookup& lookup, const BagRows& bags);
  };
};

// Ids of a lookup. With `columns` fields, id i is counted from the first row of field i % columns;
// with 0 it is a row of the table.
struct Ids {
  const int64_t* values;
  int64_t count, columns;
};

// Throws, naming the first id that lies outside its field or the table.
void embedding_check(const EmbeddingView& table, const Ids& ids);
void embedding_lookup(const EmbeddingView& table, const Ids& ids, void* out);

// Sums (or means) of bags: bag b holds ids [bag_offsets[b], bag_offsets[b + 1]), each times its
// weight where there are weights. An empty bag is zero.
struct Bags {
  const int64_t* offsets;  // [count + 1]
  const float* weights;    // [ids] or null
  int64_t count;
  bool mean;
};
void embedding_bag(const EmbeddingView& table, const Ids& ids, const Bags& bags, void* out);

// Records from the mask on disk; returns the number of values that the masks keep. Throws for bits
// beyond the last column.
int64_t embedding_pack(const uint8_t* bitmask, int64_t rows, int64_t dims, uint8_t* records);

}  // namespace pysparse
