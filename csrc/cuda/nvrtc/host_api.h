#pragma once
// The runtime's host functions as NVRTC needs them: there to be named, never to be called. Launches
// name kernels, which makes their instances exist; cudaLaunchDeviceV2 and its buffer are what
// <<<...>>> inside a device function turns into.
#include <cuda_runtime.h>
#include <math_constants.h>

#define INFINITY CUDART_INF_F  // of <cmath>

inline cudaError_t cudaGetDevice(int*) { return cudaErrorNotSupported; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorNotSupported; }
inline cudaError_t cudaGetDeviceCount(int*) { return cudaErrorNotSupported; }
inline cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) {
  return cudaErrorNotSupported;
}
inline cudaError_t cudaGetLastError() { return cudaErrorNotSupported; }
inline const char* cudaGetErrorString(cudaError_t) { return nullptr; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaErrorNotSupported;
}
template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t*, void (*)(Parameters...), Parameters...) {
  return cudaErrorNotSupported;
}

extern "C" {
inline void* cudaGetParameterBufferV2(void*, dim3, dim3, unsigned) { return nullptr; }
inline cudaError_t cudaLaunchDeviceV2(void*, cudaStream_t) { return cudaErrorNotSupported; }
}
