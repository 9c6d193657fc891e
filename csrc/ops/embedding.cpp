// Checks ids, finds rows and fields a few at a time, and shares them over the threads.
#include "pysparse/embedding.h"

#include <algorithm>
#include <vector>

#include "pysparse/error.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

constexpr int64_t kChunk = 512;  // ids that a kernel takes at once

int64_t first_row(const EmbeddingView& t, const Ids& ids, int64_t i) {
  return ids.columns ? t.field_rows[i % ids.columns] : 0;
}
int64_t row_count(const EmbeddingView& t, const Ids& ids, int64_t i) {
  if (!ids.columns) return t.rows;
  const int64_t field = i % ids.columns;
  return t.field_rows[field + 1] - t.field_rows[field];
}
int32_t field_of(const EmbeddingView& t, const Ids& ids, int64_t i, int64_t row) {
  if (ids.columns) return static_cast<int32_t>(i % ids.columns);
  if (t.fields == 1) return 0;
  const int64_t* after = std::upper_bound(t.field_rows, t.field_rows + t.fields + 1, row);
  return static_cast<int32_t>(after - t.field_rows - 1);
}

// Hands ids [begin, end) to the kernel; `take` receives each chunk's place and size.
template <class Take>
void in_chunks(const EmbeddingView& t, const Ids& ids, int64_t begin, int64_t end,
               const Take& take) {
  int64_t rows[kChunk];
  int32_t fields[kChunk];
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = std::min(kChunk, end - first);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = first_row(t, ids, first + i) + ids.values[first + i];
      fields[i] = field_of(t, ids, first + i, rows[i]);
    }
    take(Lookup{rows, fields, count}, first);
  }
}

void add_row(const EmbeddingView& t, const void* row, float weight, float* sum) {
  if (t.dtype == DType::kFloat32)
    for (int64_t d = 0; d < t.dims; ++d) sum[d] += weight * static_cast<const float*>(row)[d];
  else
    for (int64_t d = 0; d < t.dims; ++d)
      sum[d] += weight * to_float(static_cast<const BFloat16*>(row)[d]);
}

void write_row(const EmbeddingView& t, const float* sum, float scale, void* row) {
  if (t.dtype == DType::kFloat32)
    for (int64_t d = 0; d < t.dims; ++d) static_cast<float*>(row)[d] = sum[d] * scale;
  else
    for (int64_t d = 0; d < t.dims; ++d) assign(static_cast<BFloat16*>(row)[d], sum[d] * scale);
}

}  // namespace

void embedding_check(const EmbeddingView& t, const Ids& ids) {
  check(ids.columns == 0 || ids.columns == t.fields, "ids have ", ids.columns,
        " columns, the table has ", t.fields, " fields");
  for (int64_t i = 0; i < ids.count; ++i) {
    const int64_t size = row_count(t, ids, i);
    if (static_cast<uint64_t>(ids.values[i]) < static_cast<uint64_t>(size)) continue;
    if (ids.columns)
      fail("id ", ids.values[i], " at position ", i, " is outside field ", i % ids.columns,
           ": [0, ", size, ")");
    fail("id ", ids.values[i], " at position ", i, " is outside the table: [0, ", size, ")");
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
  const auto& kernel = lookup<EmbeddingLookup>(t.dtype);
  const int64_t row_bytes = t.dims * size_of(t.dtype);
  parallel(threads_for(ids.count * row_bytes), [&](int thread, int threads) {
    std::vector<char> rows(static_cast<size_t>(kChunk * row_bytes));
    std::vector<float> sum(static_cast<size_t>(t.dims));
    const Range share = even_share(bags.count, thread, threads);
    for (int64_t b = share.begin; b < share.end; ++b) {
      const int64_t begin = bags.offsets[b], end = bags.offsets[b + 1];
      std::fill(sum.begin(), sum.end(), 0.0f);
      in_chunks(t, ids, begin, end, [&](const Lookup& chunk, int64_t first) {
        kernel.run(t, chunk, rows.data());
        for (int64_t i = 0; i < chunk.count; ++i)
          add_row(t, rows.data() + i * row_bytes, bags.weights ? bags.weights[first + i] : 1.0f,
                  sum.data());
      });
      const float scale = bags.mean && end > begin ? 1.0f / static_cast<float>(end - begin) : 1.0f;
      write_row(t, sum.data(), scale, static_cast<char*>(out) + b * row_bytes);
    }
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
