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

template <class Lanes>
void embedding_rows(const EmbeddingView& table, const Lookup& lookup, void* out) {
  using T = typename Lanes::Value;
  constexpr int64_t kWidth = Lanes::kWidth;
  const T* values = static_cast<const T*>(table.values);
  const T* codebook = static_cast<const T*>(table.codebook);
  T* target = static_cast<T*>(out);
  int64_t firsts[kAhead];
  // Three lookups in one step: records far ahead, values nearer, and the row itself.
  for (int64_t i = -2 * kAhead; i < lookup.count; ++i) {
    if (const int64_t far = i + 2 * kAhead; far < lookup.count) {
      // A record begins with its offset and ends, at most a few lines on, with the row's own mask.
      _mm_prefetch(reinterpret_cast<const char*>(table.record(lookup.rows[far])), _MM_HINT_T0);
      prefetch_lines(table.mask(lookup.rows[far]), table.row_bytes());
    }
    const int64_t near = i + kAhead;
    int64_t next_first = 0;
    if (near >= 0 && near < lookup.count) {
      next_first = table.first_value(lookup.rows[near]);
      prefetch_lines(values + next_first, table.dims * static_cast<int64_t>(sizeof(T)) / 4);
    }
    const int64_t slot = (i + 2 * kAhead) % kAhead;
    if (i >= 0) {
      const T* next = values + firsts[slot];
      const uint8_t* mask = table.mask(lookup.rows[i]);
      const T* code = codebook + lookup.fields[i] * table.dims;
      for (int64_t d = 0; d < table.dims; d += kWidth) {
        const int64_t left = std::min(kWidth, table.dims - d);
        const uint32_t bits = mask_bits(mask + d / 8, left);
        const uint32_t inside = left == 32 ? ~0u : (1u << left) - 1;
        Lanes::spread(target + d, code + d, next, bits, inside);
        next += _mm_popcnt_u32(bits);
      }
      target += table.dims;
    }
    firsts[slot] = next_first;
  }
}

}  // namespace
}  // namespace pysparse
