#pragma once
// What all kernels share: 16-bit types, warp sums, streaming loads, and the host's view of a
// device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "api.h"
#include "pysparse/device_layout.h"

namespace pysparse::cuda {

using namespace layout;

constexpr unsigned kFullWarp = 0xffffffffu;

// Two 16-bit values of a word, widened. bf16 is the upper half of a float, so its conversion is one
// shift or mask.
template <class T>
__device__ __forceinline__ float low_value(uint32_t word);
template <class T>
__device__ __forceinline__ float high_value(uint32_t word);
template <>
__device__ __forceinline__ float low_value<__nv_bfloat16>(uint32_t word) {
  return __uint_as_float(word << 16);
}
template <>
__device__ __forceinline__ float high_value<__nv_bfloat16>(uint32_t word) {
  return __uint_as_float(word & 0xffff0000u);
}
template <>
__device__ __forceinline__ float low_value<__half>(uint32_t word) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu)));
}
template <>
__device__ __forceinline__ float high_value<__half>(uint32_t word) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}

__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
template <class T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}

// Bits of an exponent that is all ones: Inf or NaN.
template <class T>
constexpr uint32_t kExponent = 0;
template <>
constexpr uint32_t kExponent<__nv_bfloat16> = 0x7f80u;
template <>
constexpr uint32_t kExponent<__half> = 0x7c00u;

template <class T>
__device__ __forceinline__ bool is_not_finite(uint32_t half) {
  return (half & kExponent<T>) == kExponent<T>;
}
template <class T>
__device__ __forceinline__ bool any_not_finite(uint32_t word) {
  return is_not_finite<T>(word) || is_not_finite<T>(word >> 16);
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int d = kLanes / 2; d; d /= 2) value += __shfl_xor_sync(kFullWarp, value, d);
  return value;
}

struct Device {
  int multiprocessors, threads, shared_block,
      shared_total;  // per multiprocessor, but for shared_block
  int capability;    // major
};

inline cudaError_t describe(int device, Device& card) {
  constexpr int kMost = 64;
  static Device cache[kMost];
  static std::atomic<bool> known[kMost];
  if (device < 0 || device >= kMost) return cudaErrorInvalidDevice;
  if (!known[device].load(std::memory_order_acquire)) {
    const auto read = [&](int& value, cudaDeviceAttr name) {
      return cudaDeviceGetAttribute(&value, name, device);
    };
    Device fresh{};
    cudaError_t error = read(fresh.multiprocessors, cudaDevAttrMultiProcessorCount);
    if (!error) error = read(fresh.threads, cudaDevAttrMaxThreadsPerMultiProcessor);
    if (!error) error = read(fresh.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    if (!error) error = read(fresh.shared_total, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    if (!error) error = read(fresh.capability, cudaDevAttrComputeCapabilityMajor);
    if (error) return error;
    cache[device] = fresh;  // two threads may both write it, with the same numbers
    known[device].store(true, std::memory_order_release);
  }
  card = cache[device];
  return cudaSuccess;
}

// Makes `device` current for the calls of one scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : error_(cudaGetDevice(&before_)) {
    if (!error_ && device != before_) error_ = cudaSetDevice(device), changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
  bool changed_ = false;
};

// Allows a kernel its dynamic shared memory; above 48 KB that must be asked for.
template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, int bytes) {
  return bytes <= 48 << 10
             ? cudaSuccess
             : cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

inline cudaStream_t stream_of(const Target& target) {
  return static_cast<cudaStream_t>(target.stream);
}

}  // namespace pysparse::cuda
