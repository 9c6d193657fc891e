#pragma once
// The host's stand-in for csrc/cuda/attention_tile.cuh: copies that may bring zeros, and 8 x 8 matrices by the PTX
// manual's maps.
#include "pipe.cuh"

namespace pysparse::cuda {

template <int kDim>
int unit_place(int row, int unit) { return (row * (kDim / 8) + (unit ^ (row & 7))) * kUnitBytes; }

inline void copy_unit_or_zero(void* shared, const void* global, bool present) {
  static const uint64_t zeros[2] = {};
  copy_unit(shared, present ? global : zeros);
}

// Element (row, column) of the i-th matrix, from the address that lane 8 i + row gave.
inline uint32_t matrix_element(int i, int row, int column) {
  const char* address;
  std::memcpy(&address, &shim::slots[shim::warp()][8 * i + row], sizeof(address));
  uint16_t bits;
  std::memcpy(&bits, address + 2 * column, 2);
  return bits;
}
inline void give_address(const void* row) { std::memcpy(&shim::slots[shim::warp()][shim::lane()], &row, sizeof(row)); }

inline void load_matrices(uint32_t (&words)[4], const void* row) {
  give_address(row);
  shim::meet();
  const int r = shim::lane() / 4, c = 2 * (shim::lane() % 4);
  for (int i = 0; i < 4; ++i) words[i] = matrix_element(i, r, c) | matrix_element(i, r, c + 1) << 16;
  shim::meet();
}
inline void load_transposed(uint32_t (&words)[4], const void* row) {
  give_address(row);
  shim::meet();
  const int r = 2 * (shim::lane() % 4), c = shim::lane() / 4;
  for (int i = 0; i < 4; ++i) words[i] = matrix_element(i, r, c) | matrix_element(i, r + 1, c) << 16;
  shim::meet();
}
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace pysparse::cuda
