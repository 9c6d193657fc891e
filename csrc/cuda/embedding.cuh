#pragma once
// Rows of a pruned table: a few neighbouring lanes share a row, each finds its own entry. What a
// lookup waits for is a chain of three loads (id, record, values), so the kernels want many rows in
// flight and nothing else; all lanes of a row read its record by the same loads.
#include "embedding.h"
#include "entry.cuh"

namespace pysparse::cuda {

constexpr int kEmbeddingThreads = 256;
constexpr int kEmbeddingGroup = 8;  // rows that share a record
constexpr int kAhead = 4;           // rows of a bag whose entries are loaded before any is added

struct Place {
  int64_t row;  // below 0: outside
  int field;
};

__device__ inline Place place_of(const EmbeddingTable& table, const EmbeddingIds& ids, int64_t i) {
  const int64_t id = __ldg(ids.values + i);
  const int field = ids.columns ? static_cast<int>(i % ids.columns) : 0;
  const int64_t first = ids.columns ? __ldg(table.field_rows + field) : 0;
  const int64_t end = __ldg(table.field_rows + (ids.columns ? field + 1 : table.fields));
  if (static_cast<uint64_t>(id) >= static_cast<uint64_t>(end - first)) return {-1, 0};
  if (ids.columns) return {first + id, field};
  int lower = 0, upper = table.fields;  // the last field that begins at or before the row
  while (upper - lower > 1) {
    const int middle = (lower + upper) / 2;
    (__ldg(table.field_rows + middle) <= id ? lower : upper) = middle;
  }
  return {id, lower};
}

// A row's record, from `column` (a multiple of 8) on.
struct RowMask {
  int64_t next;         // index of the first value stored at or after the column
  const uint8_t* mask;  // of the columns from there on
};

__device__ inline RowMask row_mask(const EmbeddingTable& table, int64_t row, int column) {
  const int row_bytes = (table.dims + 7) / 8;
  const uint8_t* record = table.records + row / kEmbeddingGroup * (8 + kEmbeddingGroup * row_bytes);
  const auto* words = reinterpret_cast<const uint64_t*>(record);  // records are whole words
  // The masks of a record lie one after the other, so what is stored before is a run of bits.
  const int bytes = static_cast<int>(row % kEmbeddingGroup) * row_bytes + column / 8;
  int64_t next = static_cast<int64_t>(__ldg(words));
  for (int at = 0; at < bytes; at += 8) {
    uint64_t word = __ldg(words + 1 + at / 8);
    if (bytes - at < 8) word &= (uint64_t{1} << 8 * (bytes - at)) - 1;
    next += __popcll(word);
  }
  return {next, record + 8 + bytes};
}

// The bits of kGroup columns from the mask's first byte on; those at and beyond `columns` are zero.
template <int kGroup>
__device__ __forceinline__ uint32_t mask_bits(const uint8_t* mask, int columns) {
  uint32_t bits = 0;
#pragma unroll
  for (int byte = 0; byte < kGroup / 8; ++byte)
    if (8 * byte < columns) bits |= static_cast<uint32_t>(__ldg(mask + byte)) << 8 * byte;
  return bits;
}

// The entry of `lane`'s column: stored, or the codebook's.
template <class T>
__device__ __forceinline__ T entry_of(const EmbeddingTable& table, int field, int column, int lane,
                                      uint32_t bits, int64_t next) {
  if (bits >> lane & 1u)
    return __ldg(static_cast<const T*>(table.values) + next + __popc(bits & ((1u << lane) - 1u)));
  return __ldg(static_cast<const T*>(table.codebook) + static_cast<int64_t>(field) * table.dims +
               column);
}

// T is a word as wide as an entry: rows are copied, not computed with. `missing` is its NaN.
template <class T, int kGroup>
__global__ __launch_bounds__(kEmbeddingThreads) void embedding_lookup_kernel(EmbeddingTable table,
                                                                             EmbeddingIds ids,
                                                                             T missing, T* out) {
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const int64_t i =
      static_cast<int64_t>(blockIdx.x) * (kEmbeddingThreads / kGroup) + threadIdx.x / kGroup;
  if (i >= ids.count) return;
  const Place place = place_of(table, ids, i);
  T* row = out + i * table.dims;
  if (place.row < 0) {
    for (int d = lane; d < table.dims; d += kGroup) row[d] = missing;
    return;
  }
  RowMask at = row_mask(table, place.row, 0);
  for (int first = 0; first < table.dims; first += kGroup, at.mask += kGroup / 8) {
    const uint32_t bits = mask_bits<kGroup>(at.mask, table.dims - first);
    const int d = first + lane;
    if (d < table.dims) row[d] = entry_of<T>(table, place.field, d, lane, bits, at.next);
    at.next += __popc(bits);
  }
}

// What one lane finds out about an id of a bag, for all lanes of its group.
struct alignas(16) FoundRow {
  int64_t next;   // index of the row's first value stored at or after the group's first column
  uint32_t bits;  // which of the group's columns are stored
  int field;      // below 0: the id is outside
};

template <int kGroup>
__device__ inline FoundRow find_row(const EmbeddingTable& table, const EmbeddingIds& ids, int64_t i,
                                    int first_column) {
  const Place place = place_of(table, ids, i);
  if (place.row < 0) return {0, 0, -1};
  const RowMask at = row_mask(table, place.row, first_column);
  return {at.next, mask_bits<kGroup>(at.mask, table.dims - first_column), place.field};
}

// blockIdx.y counts groups of columns. Each lane of a group looks up another id, so that the chains
// of loads of all of them overlap; then the lanes go through the rows together, a column each. The
// sums are those of the CPU, bit for bit: one after the other, each rounded once.
template <class T, int kGroup>
__global__ __launch_bounds__(kEmbeddingThreads) void embedding_bag_kernel(EmbeddingTable table,
                                                                          EmbeddingIds ids,
                                                                          EmbeddingBags bags,
                                                                          T* out) {
  using Word = typename Numbers<T>::Word;
  __shared__ FoundRow found[kEmbeddingThreads];
  const int lane = static_cast<int>(threadIdx.x) % kGroup;
  const FoundRow* group = found + (threadIdx.x - lane);
  const int first_column = static_cast<int>(blockIdx.y) * kGroup, column = first_column + lane;
  const int64_t bag =
      static_cast<int64_t>(blockIdx.x) * (kEmbeddingThreads / kGroup) + threadIdx.x / kGroup;
  const bool exists = bag < bags.count;
  const int64_t begin = exists ? __ldg(bags.offsets + bag) : 0;
  const int64_t end = exists ? __ldg(bags.offsets + bag + 1) : 0;
  bool sound = 0 <= begin && begin <= end && end <= ids.count;
  const int64_t size = sound ? end - begin : 0;
  int64_t longest = size;  // of the warp's bags: all its lanes meet at the barriers
#pragma unroll
  for (int d = kGroup; d < kLanes; d *= 2) {
    const int64_t other = __shfl_xor_sync(kFullWarp, longest, d);
    longest = other > longest ? other : longest;
  }
  float sum = 0.0f;
  for (int64_t first = 0; first < longest; first += kGroup) {
    __syncwarp();  // nobody reads the rows before any more
    if (first + lane < size)
      found[threadIdx.x] = find_row<kGroup>(table, ids, begin + first + lane, first_column);
    __syncwarp();  // the new ones are there
    const int count = static_cast<int>(size - first < kGroup ? size - first : kGroup);
    for (int i = 0; i < count; i += kAhead) {
      float entry[kAhead] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        if (i + a >= count) continue;
        const FoundRow row = group[i + a];
        sound &= row.field >= 0;
        if (row.field >= 0 && column < table.dims)
          entry[a] =
              Numbers<T>::of(entry_of<Word>(table, row.field, column, lane, row.bits, row.next));
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a)
        if (i + a < count) {
          const float weight = bags.weights ? __ldg(bags.weights + begin + first + i + a) : 1.0f;
          sum = __fmaf_rn(weight, entry[a], sum);
        }
    }
  }
  if (!exists || column >= table.dims) return;
  if (bags.mean && begin < end)
    sum = __fmul_rn(sum, __fdiv_rn(1.0f, static_cast<float>(end - begin)));
  if (!sound) sum = __uint_as_float(0x7fffffffu);
  out[bag * table.dims + column] = narrow<T>(sum);
}

__global__ __launch_bounds__(kEmbeddingThreads) void embedding_check_kernel(EmbeddingTable table,
                                                                            EmbeddingIds ids,
                                                                            EmbeddingBags bags,
                                                                            uint64_t* faults) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kEmbeddingThreads + threadIdx.x;
  auto* lowest = reinterpret_cast<unsigned long long*>(faults);
  if (i < ids.count && place_of(table, ids, i).row < 0)
    atomicMin(lowest, static_cast<unsigned long long>(i));
  if (i >= bags.count) return;
  const int64_t begin = __ldg(bags.offsets + i), end = __ldg(bags.offsets + i + 1);
  if (begin < 0 || end < begin || end > ids.count)
    atomicMin(lowest + 1, static_cast<unsigned long long>(i));
}

}  // namespace pysparse::cuda
