// Rows of a pruned table, a register at a time. `Lanes` says how many entries a register holds and
// how stored values are spread over a codebook's. Include it inside the target region of a level.
#include <algorithm>

namespace pysparse {
namespace {

constexpr int64_t kAhead = 16;  // lookups between asking for a line and reading it

// Asks for every line of [begin, begin + bytes).
inline void prefetch_lines(const void* begin, int64_t bytes) {
  const char* line = static_cast<const char*>(begin);
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(line + at, _MM_HINT_T0);
}

// The bits of up to 32 columns; a copy of a size known at run time would be a call.
inline uint32_t mask_bits(const uint8_t* mask, int64_t columns) {
  uint32_t bits = mask[0];
  if (columns > 8) bits |= uint32_t{mask[1]} << 8;
  if (columns > 16) bits |= uint32_t{mask[2]} << 16;
  if (columns > 24) bits |= uint32_t{mask[3]} << 24;
  return bits;
}

// A row whose dims are known when this is compiled, or not (0). The usual 16 columns cost one
// expansion, and their eight masks are two words: no loop that a branch predictor has to guess.
template <int kDims>
struct Place {
  const EmbeddingView& table;

  int64_t dims() const { return kDims ? kDims : table.dims; }
  const uint8_t* record(int64_t row) const {
    if constexpr (kDims == 16) return table.records + static_cast<uint64_t>(row) / 8 * 24;
    return table.record(row);
  }
  const uint8_t* mask(int64_t row) const {
    if constexpr (kDims == 16) return record(row) + 8 + 2 * (static_cast<uint64_t>(row) % 8);
    return table.mask(row);
  }
  int64_t first_value(int64_t row) const {
    if constexpr (kDims != 16) return table.first_value(row);
    const uint8_t* words = record(row);
    uint64_t first, low, high;
    std::memcpy(&first, words, 8);
    std::memcpy(&low, words + 8, 8);
    std::memcpy(&high, words + 16, 8);
    const unsigned before = 16 * (static_cast<unsigned>(row) % 8);  // bits of the rows between
    low = _bzhi_u64(low, before);
    high = _bzhi_u64(high, before > 64 ? before - 64 : 0);
    return static_cast<int64_t>(first) + _mm_popcnt_u64(low) + _mm_popcnt_u64(high);
  }
};

// Calls visit(i, next, mask) for each lookup, its stored values and its mask in the first cache.
template <class T, int kDims, class Visit>
inline void visit_rows(const EmbeddingView& table, const Lookup& lookup, const Visit& visit) {
  const Place<kDims> place{table};
  const T* values = static_cast<const T*>(table.values);
  int64_t firsts[kAhead];
  // Three lookups in one step: records far ahead, values nearer, and the row itself.
  for (int64_t i = -2 * kAhead; i < lookup.count; ++i) {
    if (const int64_t far = i + 2 * kAhead; far < lookup.count) {
      // A record begins with its offset and ends, at most a few lines on, with the row's own mask.
      _mm_prefetch(reinterpret_cast<const char*>(place.record(lookup.rows[far])), _MM_HINT_T0);
      prefetch_lines(place.mask(lookup.rows[far]), table.row_bytes());
    }
    const int64_t near = i + kAhead;
    int64_t next_first = 0;
    if (near >= 0 && near < lookup.count) {
      next_first = place.first_value(lookup.rows[near]);
      prefetch_lines(values + next_first, place.dims() * static_cast<int64_t>(sizeof(T)) / 4);
    }
    const auto slot = static_cast<uint64_t>(i + 2 * kAhead) % kAhead;
    if (i >= 0) visit(i, values + firsts[slot], place.mask(lookup.rows[i]));
    firsts[slot] = next_first;
  }
}

// Calls take(column, entries, lanes that are columns) for each register of a row.
template <class Lanes, int kDims, class Take>
inline void decode_row(const typename Lanes::Value* code, const typename Lanes::Value* next,
                       const uint8_t* mask, int64_t dims, const Take& take) {
  constexpr int64_t kWidth = Lanes::kWidth;
  for (int64_t d = 0; d < dims; d += kWidth) {
    const int64_t left = std::min(kWidth, dims - d);
    const uint32_t bits = mask_bits(mask + d / 8, left);
    const uint32_t inside = left == 32 ? ~0u : (1u << left) - 1;
    take(d, Lanes::decode(code + d, next, bits, inside), inside);
    if (d + kWidth < dims) next += _mm_popcnt_u32(bits);
  }
}

template <class Lanes, int kDims>
void write_rows(const EmbeddingView& table, const Lookup& lookup, void* out) {
  using T = typename Lanes::Value;
  const T* codebook = static_cast<const T*>(table.codebook);
  const int64_t dims = Place<kDims>{table}.dims();
  visit_rows<T, kDims>(table, lookup, [&](int64_t i, const T* next, const uint8_t* mask) {
    T* target = static_cast<T*>(out) + i * dims;
    decode_row<Lanes, kDims>(codebook + lookup.fields[i] * dims, next, mask, dims,
                             [&](int64_t d, auto entries, uint32_t inside) {
                               Lanes::store(target + d, entries, inside);
                             });
  });
}

template <class Lanes>
void embedding_rows(const EmbeddingView& table, const Lookup& lookup, void* out) {
  (table.dims == 16 ? write_rows<Lanes, 16> : write_rows<Lanes, 0>)(table, lookup, out);
}

template <class Lanes>
void add_rows(const EmbeddingView& table, const Lookup& lookup, const BagRows& to) {
  using T = typename Lanes::Value;
  const T* codebook = static_cast<const T*>(table.codebook);
  visit_rows<T, 0>(table, lookup, [&](int64_t i, const T* next, const uint8_t* mask) {
    float* sum = to.sums + to.bags[i] * table.dims;
    const __m512 weight = _mm512_set1_ps(to.weights ? to.weights[i] : 1.0f);
    const auto add = [&](int64_t d, auto entries, uint32_t inside) {
      for (int half = 0; half < Lanes::kWidth / 16; ++half, inside >>= 16) {
        const auto lanes = static_cast<__mmask16>(inside);
        float* at = sum + d + 16 * half;
        const __m512 old = _mm512_maskz_loadu_ps(lanes, at);
        _mm512_mask_storeu_ps(at, lanes,
                              _mm512_fmadd_ps(weight, Lanes::numbers(entries, half), old));
      }
    };
    decode_row<Lanes, 0>(codebook + lookup.fields[i] * table.dims, next, mask, table.dims, add);
  });
}

// Sixteen columns: a bag's sum stays in a register.
template <class Lanes>
void add_short_rows(const EmbeddingView& table, const Lookup& lookup, const BagRows& to) {
  using T = typename Lanes::Value;
  if (lookup.count == 0) return;
  const T* codebook = static_cast<const T*>(table.codebook);
  int32_t bag = to.bags[0];
  __m512 sum = _mm512_loadu_ps(to.sums + bag * int64_t{16});
  visit_rows<T, 16>(table, lookup, [&](int64_t i, const T* next, const uint8_t* mask) {
    if (to.bags[i] != bag) {
      _mm512_storeu_ps(to.sums + bag * int64_t{16}, sum);
      bag = to.bags[i];
      sum = _mm512_loadu_ps(to.sums + bag * int64_t{16});
    }
    const T* code = codebook + lookup.fields[i] * int64_t{16};
    const __m512 row = Lanes::numbers(Lanes::decode(code, next, mask_bits(mask, 16), 0xFFFFu), 0);
    sum = to.weights ? _mm512_fmadd_ps(_mm512_set1_ps(to.weights[i]), row, sum)
                     : _mm512_add_ps(sum, row);
  });
  _mm512_storeu_ps(to.sums + bag * int64_t{16}, sum);
}

template <class Lanes>
void embedding_sums(const EmbeddingView& table, const Lookup& lookup, const BagRows& to) {
  (table.dims == 16 ? add_short_rows<Lanes> : add_rows<Lanes>)(table, lookup, to);
}

}  // namespace
}  // namespace pysparse
