// Checks ids, finds rows and fields a few at a time, and shares them over the threads.
#include "pysparse/embedding.h"

#include <algorithm>
#include <vector>

#include "pysparse/error.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

constexpr int64_t kChunk = 1024;  // ids that a kernel takes at once

int32_t field_of_row(const EmbeddingView& t, int64_t row) {
  if (t.fields == 1) return 0;
  const int64_t* after = std::upper_bound(t.field_rows, t.field_rows + t.fields + 1, row);
  return static_cast<int32_t>(after - t.field_rows - 1);
}

// Rows and fields of ids [first, first + count).
void find_rows(const EmbeddingView& t, const Ids& ids, int64_t first, int64_t count, int64_t* rows,
               int32_t* fields) {
  int64_t field = ids.columns ? first % ids.columns : 0;  // counted on: a division an id is slow
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = ids.values[first + i];
    if (ids.columns) {
      rows[i] += t.field_rows[field];
      fields[i] = static_cast<int32_t>(field);
      field = field + 1 == ids.columns ? 0 : field + 1;
    } else {
      fields[i] = field_of_row(t, rows[i]);
    }
  }
}

// Hands ids [begin, end) to the kernel; `take` receives each chunk's place and size.
template <class Take>
void in_chunks(const EmbeddingView& t, const Ids& ids, int64_t begin, int64_t end,
               const Take& take) {
  int64_t rows[kChunk];
  int32_t fields[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = std::min(kChunk, end - first);
    find_rows(t, ids, first, count, rows, fields);
    take(Lookup{rows, fields, count}, first);
  }
}

void write_row(const EmbeddingView& t, const float* sum, float scale, void* row) {
  if (t.dtype == DType::kFloat32)
    for (int64_t d = 0; d < t.dims; ++d) static_cast<float*>(row)[d] = sum[d] * scale;
  else
    for (int64_t d = 0; d < t.dims; ++d) assign(static_cast<BFloat16*>(row)[d], sum[d] * scale);
}

// Sums of bags [begin, end), some of them at a time: a kernel goes on from bag to bag.
class BagSums {
 public:
  BagSums(const EmbeddingView& t, const Ids& ids, const Bags& bags)
      : t_(t), ids_(ids), bags_(bags), sums_(static_cast<size_t>(kBags * t.dims)) {}

  void write(int64_t begin, int64_t end, void* out) {
    const int64_t row_bytes = t_.dims * size_of(t_.dtype);
    for (int64_t first = begin; first < end; first += kBags) {
      const int64_t last = std::min(first + kBags, end);
      add(first, last);
      for (int64_t b = first; b < last; ++b) {
        const int64_t size = bags_.offsets[b + 1] - bags_.offsets[b];
        const float scale = bags_.mean && size > 0 ? 1.0f / static_cast<float>(size) : 1.0f;
        write_row(t_, sums_.data() + (b - first) * t_.dims, scale,
                  static_cast<char*>(out) + b * row_bytes);
      }
    }
  }

 private:
  static constexpr int64_t kBags = 64;

  void add(int64_t first, int64_t last) {
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    int32_t numbers[kChunk];
    int64_t bag = first;
    in_chunks(t_, ids_, bags_.offsets[first], bags_.offsets[last],
              [&](const Lookup& chunk, int64_t at) {
                for (int64_t i = 0; i < chunk.count; ++i) {
                  while (at + i >= bags_.offsets[bag + 1]) ++bag;
                  numbers[i] = static_cast<int32_t>(bag - first);
                }
                const float* weights = bags_.weights ? bags_.weights + at : nullptr;
                kernel_.add(t_, chunk, {numbers, weights, sums_.data()});
              });
  }

  const EmbeddingView& t_;
  const Ids& ids_;
  const Bags& bags_;
  std::vector<float> sums_;
  const EmbeddingLookup::Kernel& kernel_ = lookup<EmbeddingLookup>(t_.dtype);
};

void check_id(const Ids& ids, int64_t i, int64_t field, int64_t size) {
  if (static_cast<uint64_t>(ids.values[i]) < static_cast<uint64_t>(size)) return;
  if (ids.columns)
    fail("id ", ids.values[i], " at position ", i, " is outside field ", field, ": [0, ", size,
         ")");
  fail("id ", ids.values[i], " at position ", i, " is outside the table: [0, ", size, ")");
}

}  // namespace

void embedding_check(const EmbeddingView& t, const Ids& ids) {
  check(ids.columns == 0 || ids.columns == t.fields, "ids have ", ids.columns,
        " columns, the table has ", t.fields, " fields");
  if (ids.columns == 0) {  // usual: a test of all, and the message apart
    bool outside = false;
    for (int64_t i = 0; i < ids.count; ++i)
      outside |= static_cast<uint64_t>(ids.values[i]) >= static_cast<uint64_t>(t.rows);
    if (!outside) return;
  }
  int64_t field = 0;
  for (int64_t i = 0; i < ids.count; ++i) {
    const int64_t size = ids.columns ? t.field_rows[field + 1] - t.field_rows[field] : t.rows;
    check_id(ids, i, field, size);
    if (ids.columns) field = field + 1 == ids.columns ? 0 : field + 1;
  }
}

void embedding_lookup(const EmbeddingView& t, const Ids& ids, void* out) {
  embedding_check(t, ids);
  const auto& kernel = lookup<EmbeddingLookup>(t.dtype);
  const int64_t row_bytes = t.dims * size_of(t.dtype);
  parallel(threads_for(ids.count * row_bytes), [&](int thread, int threads) {
    const Range share = even_share(ids.count, thread, threads);
    in_chunks(t, ids, share.begin, share.end, [&](const Lookup& chunk, int64_t first) {
      kernel.run(t, chunk, static_cast<char*>(out) + first * row_bytes);
    });
  });
}

void embedding_bag(const EmbeddingView& t, const Ids& ids, const Bags& bags, void* out) {
  embedding_check(t, ids);
  for (int64_t b = 0; b < bags.count; ++b)
    check(0 <= bags.offsets[b] && bags.offsets[b] <= bags.offsets[b + 1], "bag ", b, " begins at ",
          bags.offsets[b], " and ends at ", bags.offsets[b + 1]);
  check(bags.count == 0 || bags.offsets[bags.count] <= ids.count, "bags end at id ",
        bags.count ? bags.offsets[bags.count] : 0, ", there are ", ids.count);
  const int64_t row_bytes = t.dims * size_of(t.dtype);
  parallel(threads_for(ids.count * row_bytes), [&](int thread, int threads) {
    const Range share = even_share(bags.count, thread, threads);
    BagSums(t, ids, bags).write(share.begin, share.end, out);
  });
}

int64_t embedding_pack(const uint8_t* bitmask, int64_t rows, int64_t dims, uint8_t* records) {
  const EmbeddingView shape{nullptr, records, nullptr, nullptr, rows, dims, 0, DType::kFloat32};
  const int64_t row_bytes = shape.row_bytes();
  const int spare = static_cast<int>(8 * row_bytes - dims);
  int64_t total = 0;
  for (int64_t group = 0; group < shape.groups(); ++group) {
    uint8_t* record = records + group * shape.record_bytes();
    std::memset(record, 0, static_cast<size_t>(shape.record_bytes()));
    std::memcpy(record, &total, 8);
    const int64_t first = group * kEmbeddingGroup, count = std::min(kEmbeddingGroup, rows - first);
    std::memcpy(record + 8, bitmask + first * row_bytes, static_cast<size_t>(count * row_bytes));
    for (int64_t r = 0; r < count; ++r) {
      const uint8_t last = row_bytes ? record[8 + (r + 1) * row_bytes - 1] : uint8_t{0};
      check(spare == 0 || last >> (8 - spare) == 0, "row ", first + r,
            " has mask bits set beyond column ", dims - 1);
    }
    for (int64_t word = 0; word < row_bytes; ++word) {  // 8 rows of row_bytes are so many words
      uint64_t bits;
      std::memcpy(&bits, record + 8 + 8 * word, 8);
      total += __builtin_popcountll(bits);
    }
  }
  return total;
}

}  // namespace pysparse
