#pragma once
// CUDA on host threads: one std::thread per lane, barriers for __syncthreads and the warp exchanges. It runs the
// kernels' own source, so index and control-flow errors show without a GPU. Asynchronous copies land as late as
// the waits allow. It proves nothing about speed, or about races inside a warp's step.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Index {
  int x = 0, y = 0, z = 0;
};
inline thread_local Index threadIdx;
inline Index blockIdx, blockDim, gridDim;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct int2 { int x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace shim {
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline uint64_t slots[64][32];
inline int warp() { return threadIdx.x / 32; }
inline int lane() { return threadIdx.x % 32; }
inline void meet() { warp_barriers[warp()]->arrive_and_wait(); }

template <class T>
T exchange(T value, int source) {
  std::memcpy(&slots[warp()][lane()], &value, sizeof(T));
  meet();
  T result;
  std::memcpy(&result, &slots[warp()][source], sizeof(T));
  meet();
  return result;
}

// Runs `body` as one grid of one-dimensional blocks, block after block.
template <class Body>
void launch(int blocks_x, int blocks_y, int threads, const Body& body) {
  blockDim.x = threads, gridDim.x = blocks_x, gridDim.y = blocks_y;
  for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks_x; ++blockIdx.x) {
      block_barrier = std::make_unique<std::barrier<>>(threads);
      warp_barriers.clear();
      for (int w = 0; w < threads / 32; ++w) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
      std::vector<std::thread> lanes;
      for (int t = 0; t < threads; ++t)
        lanes.emplace_back([&body, t] {
          threadIdx.x = t;
          body();
        });
      for (std::thread& thread : lanes) thread.join();
    }
}

// What kernel<<<grid, threads, shared, stream>>>(...) becomes.
template <class Body>
void run(const Body& body, dim3 grid, unsigned threads, size_t, void*) {
  launch(static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(threads), body);
}
}  // namespace shim

inline void __syncthreads() { shim::block_barrier->arrive_and_wait(); }
inline void __syncwarp() { shim::meet(); }
template <class T>
T __shfl_sync(unsigned, T value, int source) { return shim::exchange(value, source); }
template <class T>
T __shfl_up_sync(unsigned, T value, int d) {
  return shim::exchange(value, shim::lane() >= d ? shim::lane() - d : shim::lane());
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int d) { return shim::exchange(value, shim::lane() ^ d); }
inline uint32_t __ballot_sync(unsigned, bool flag) {
  uint32_t flags = 0;
  for (int i = 0; i < 32; ++i) flags |= static_cast<uint32_t>(shim::exchange(flag, i)) << i;
  return flags;
}
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __popcll(uint64_t bits) { return __builtin_popcountll(bits); }
inline int __ffs(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)); }
template <class T>
T atomicOr(T* p, T bits) { return std::atomic_ref<T>(*p).fetch_or(bits); }

template <class T>
T atomicAdd(T* p, T value) { return std::atomic_ref<T>(*p).fetch_add(value); }
template <class T, class Better>
T replace_if(T* p, T value, Better better) {
  T seen = std::atomic_ref<T>(*p).load();
  while (better(value, seen) && !std::atomic_ref<T>(*p).compare_exchange_weak(seen, value)) {}
  return seen;
}
template <class T>
T atomicMin(T* p, T value) { return replace_if(p, value, std::less<T>()); }
template <class T>
T atomicMax(T* p, T value) { return replace_if(p, value, std::greater<T>()); }

// Rounded operations, each for itself: the tests compile without contraction.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline long long __double2ll_rn(double x) { return std::llrint(x); }
using std::isnan;

inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (std::isnan(v)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
struct __half { uint16_t bits; };
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half v) {
  _Float16 value;
  std::memcpy(&value, &v.bits, 2);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float v) {
  const auto value = static_cast<_Float16>(v);
  __half result;
  std::memcpy(&result.bits, &value, 2);
  return result;
}

// The few host calls that the sources make.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidDevice = 101 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount, cudaDevAttrMaxThreadsPerMultiProcessor, cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor, cudaDevAttrComputeCapabilityMajor
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;
// An H200, number 0.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  constexpr int kFigures[] = {132, 2048, 232448, 233472, 9};
  *value = kFigures[name];
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidDevice; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int) { return cudaSuccess; }
