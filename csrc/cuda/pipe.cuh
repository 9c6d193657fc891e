#pragma once
// Asynchronous copies from global to shared memory (sm_80 on), and the tensor-core products.
#include "common.cuh"

namespace pysparse::cuda {

__device__ __forceinline__ void copy_unit(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(address), "l"(global)
               : "memory");
}
// The same `kOffset` bytes on, where it is wanted; the condition is the instruction's own, so that
// all copies of a block share their addresses.
template <int kOffset>
__device__ __forceinline__ void copy_unit_if(bool wanted, void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %2, 0;\n"
      "@wanted cp.async.cg.shared.global [%0 + %3], [%1 + %3], 16;\n}\n" ::"r"(address),
      "l"(global), "r"(static_cast<int>(wanted)), "n"(kOffset)
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Waits until at most kPending of the thread's committed groups are still under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// A place in shared memory, counted in 16-bit words: one register, where a pointer takes two.
using HalfPlace = uint32_t;
__device__ __forceinline__ HalfPlace half_place(const void* shared) {
  return static_cast<HalfPlace>(__cvta_generic_to_shared(shared));
}
__device__ __forceinline__ HalfPlace halves_on(HalfPlace place, int count) {
  return place + 2 * static_cast<uint32_t>(count);
}
// The word at `next`, which then moves on, or 0 where it is not wanted. The addition is written by
// hand: the compiler would make it without the condition and then move the result under it.
__device__ __forceinline__ uint32_t take_if(HalfPlace& next, uint32_t wanted) {
  uint32_t value = 0;
  if (wanted)
    asm volatile("ld.shared.u16 %0, [%1];\nadd.u32 %1, %1, 2;\n" : "=r"(value), "+r"(next));
  return value;
}

// Sums of the lanes up to and with this one. A shuffle says itself whether it reached a lane.
__device__ __forceinline__ uint32_t lane_sums(uint32_t value) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2)
    asm volatile(
        "{\n.reg .b32 lower;\n.reg .pred reached;\n"
        "shfl.sync.up.b32 lower|reached, %0, %1, 0, 0xffffffff;\n"
        "@reached add.u32 %0, %0, lower;\n}\n"
        : "+r"(value)
        : "r"(d));
  return value;
}

// d += a b for 16 x 16 times 16 x 8, fp32 sums.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&d)[4], const uint32_t* a, uint32_t b0,
                                                   uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__half>(float (&d)[4], const uint32_t* a, uint32_t b0,
                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d += a b for a two-of-four sparse 16 x 32 times 32 x 8. Lanes 0, 1 (kHalf 0) or 2, 3 (kHalf 1) of
// each quad supply the metadata.
#define PYSPARSE_MMA_SP(TYPE, HALF)                                                         \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE           \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, " HALF ";\n" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                      \
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),     \
        "r"(metadata))
template <class T, int kHalf>
__device__ __forceinline__ void mma_sparse(float (&d)[4], uint4 a, uint4 b, uint32_t metadata) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if constexpr (kHalf == 0)
      PYSPARSE_MMA_SP("bf16", "0x0");
    else
      PYSPARSE_MMA_SP("bf16", "0x1");
  } else {
    if constexpr (kHalf == 0)
      PYSPARSE_MMA_SP("f16", "0x0");
    else
      PYSPARSE_MMA_SP("f16", "0x1");
  }
}
#undef PYSPARSE_MMA_SP

}  // namespace pysparse::cuda
