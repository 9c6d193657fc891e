#pragma once
// Walks over the set bits of a row-major mask.
#include <cstdint>
#include <cstring>

#include "pysparse/error.h"
#include "pysparse/views.h"

namespace pysparse {

// Bits [64 w, 64 w + 64) of a row, as a word; bytes past the end of the row read as zero.
inline uint64_t mask_word(const uint8_t* row, int64_t bytes, int64_t w) {
  uint64_t word = 0;
  const int64_t left = bytes - 8 * w;
  std::memcpy(&word, row + 8 * w, static_cast<size_t>(left < 8 ? left : 8));
  return word;
}

// Calls visit(col) for each set bit of a row, in ascending order.
template <class Visit>
void for_each_bit(const uint8_t* row, int64_t bytes, const Visit& visit) {
  for (int64_t w = 0; 8 * w < bytes; ++w)
    for (uint64_t bits = mask_word(row, bytes, w); bits; bits &= bits - 1)
      visit(64 * w + __builtin_ctzll(bits));
}

inline int64_t count_bits(const uint8_t* row, int64_t bytes) {
  int64_t count = 0;
  for (int64_t w = 0; 8 * w < bytes; ++w) count += __builtin_popcountll(mask_word(row, bytes, w));
  return count;
}

// Calls body with a typed zero of the word's size, so that values move as raw words.
template <class Body>
void with_word(int64_t bytes, const Body& body) {
  if (bytes == 1)
    body(uint8_t{});
  else if (bytes == 2)
    body(uint16_t{});
  else if (bytes == 4)
    body(uint32_t{});
  else
    fail("values have 1, 2 or 4 bytes, got ", bytes);
}

}  // namespace pysparse
