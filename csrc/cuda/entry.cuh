#pragma once
// Entries as numbers: what common.cuh does for 16-bit types, for float32 too.
#include "common.cuh"
#include "entry.h"

namespace pysparse::cuda {

__device__ __forceinline__ float widen(float value) { return value; }
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}

// Entries are loaded as plain words.
template <class T>
struct Numbers {
  using Word = unsigned short;
  static __device__ __forceinline__ float of(Word word) { return low_value<T>(word); }
};
template <>
struct Numbers<float> {
  using Word = float;
  static __device__ __forceinline__ float of(float word) { return word; }
};

}  // namespace pysparse::cuda
