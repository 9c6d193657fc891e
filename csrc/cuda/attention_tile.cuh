#pragma once
// Tiles of queries, keys and values in shared memory: copies that can skip rows, and operands of
// the tensor cores read back from them. Rows are cut in units of 16 bytes; the unit's place is
// turned by the row, so that eight rows of one column lie in different banks.
#include "pipe.cuh"

namespace pysparse::cuda {

template <int kDim>
__device__ __forceinline__ int unit_place(int row, int unit) {
  return (row * (kDim / 8) + (unit ^ (row & 7))) * kUnitBytes;
}

// 16 bytes from global memory, or zeros; `global` must be a valid address either way.
__device__ __forceinline__ void copy_unit_or_zero(void* shared, const void* global, bool present) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(global),
               "r"(present ? 16 : 0)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit values; lanes 8 i to 8 i + 7 give the addresses of matrix i's rows.
// Lane l receives elements 2 (l % 4) and the next of row l / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// The same matrices, transposed: lane l receives rows 2 (l % 4) and the next of column l / 4.
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace pysparse::cuda
