#pragma once
// The host's stand-in for csrc/cuda/pipe.cuh: late copies, and tensor-core products by the PTX manual's maps.
#include "common.cuh"

namespace pysparse::cuda {

struct Copy {
  void* target;
  const void* source;
};
inline thread_local std::deque<std::vector<Copy>> copies{1};  // committed groups, then the open one

inline void copy_unit(void* shared, const void* global) { copies.back().push_back({shared, global}); }
template <int kOffset>
void copy_unit_if(bool wanted, void* shared, const void* global) {
  if (wanted) copy_unit(static_cast<char*>(shared) + kOffset, static_cast<const char*>(global) + kOffset);
}
inline void commit_copies() { copies.emplace_back(); }
template <int kPending>
void wait_copies() {
  while (copies.size() > kPending + 1) {
    for (const Copy& copy : copies.front()) std::memcpy(copy.target, copy.source, 16);
    copies.pop_front();
  }
}

using HalfPlace = const uint16_t*;
inline HalfPlace half_place(const void* shared) { return static_cast<HalfPlace>(shared); }
inline HalfPlace halves_on(HalfPlace place, int count) { return place + count; }
inline uint32_t take_if(HalfPlace& next, uint32_t wanted) { return wanted ? *next++ : 0; }
inline uint32_t lane_sums(uint32_t value) {
  for (int d = 1; d < 32; d *= 2) {
    const uint32_t lower = __shfl_up_sync(kFullWarp, value, d);
    if (shim::lane() >= d) value += lower;
  }
  return value;
}

// One warp's operands, gathered from its lanes.
struct Operands {
  float a[16][32], b[32][8];
};
inline Operands operands[64];

inline int a_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
inline int a_col(int lane, int i) { return 2 * (lane % 4) + i % 2 + 8 * (i / 4); }
template <class T>
float half_of(const uint32_t* words, int i) {
  return i % 2 ? high_value<T>(words[i / 2]) : low_value<T>(words[i / 2]);
}

template <class T>
void gather_b(const uint32_t* b, int words) {
  for (int i = 0; i < 2 * words; ++i)
    operands[shim::warp()].b[8 * (i / 2) + 2 * (shim::lane() % 4) + i % 2][shim::lane() / 4] = half_of<T>(b, i);
}
inline void multiply_gathered(float (&d)[4], int depth) {
  shim::meet();
  const Operands& o = operands[shim::warp()];
  const int row = shim::lane() / 4, col = 2 * (shim::lane() % 4);
  for (int s = 0; s < 4; ++s)
    for (int k = 0; k < depth; ++k) d[s] += o.a[row + 8 * (s / 2)][k] * o.b[k][col + s % 2];
  shim::meet();
}

template <class T>
void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  for (int i = 0; i < 8; ++i)
    operands[shim::warp()].a[a_row(shim::lane(), i)][a_col(shim::lane(), i)] = half_of<T>(a, i);
  gather_b<T>(b, 2);
  multiply_gathered(d, 16);
}

template <class T, int kHalf>
void mma_sparse(float (&d)[4], uint4 a, uint4 b, uint32_t metadata) {
  const uint32_t words[4] = {a.x, a.y, a.z, a.w}, inputs[4] = {b.x, b.y, b.z, b.w};
  Operands& o = operands[shim::warp()];
  for (int k = 0; k < 32; ++k)  // each lane clears its share: rows lane % 16, halves of the columns
    if (k / 16 == shim::lane() / 16) o.a[shim::lane() % 16][k] = 0.f;
  std::memcpy(&shim::slots[shim::warp()][shim::lane()], &metadata, 4);
  shim::meet();
  for (int i = 0; i < 8; ++i) {
    const int row = a_row(shim::lane(), i), compressed = a_col(shim::lane(), i), group = compressed / 2;
    uint32_t word;
    std::memcpy(&word, &shim::slots[shim::warp()][4 * (row % 8) + 2 * kHalf + group / 4], 4);
    const uint32_t code = word >> (16 * (row / 8) + 4 * (group % 4) + 2 * (compressed % 2)) & 3u;
    o.a[row][4 * group + code] = half_of<T>(words, i);
  }
  gather_b<T>(inputs, 4);
  multiply_gathered(d, 32);
}

}  // namespace pysparse::cuda
