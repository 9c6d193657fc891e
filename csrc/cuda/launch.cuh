#pragma once
// Kernels of one stream that overlap at their ends (sm_90 on). A kernel may start while the one
// before it still drains: it fetches weights, and waits before it touches anything that a kernel
// writes. So weights must not come from the kernel launched just before on the same stream; copies,
// and kernels further back, are complete.
#include "common.cuh"

namespace pysparse::cuda {

// Returns when all earlier kernels of the stream are complete and their results visible, then
// allows the next one to start. In this order a chain of kernels cannot run ahead by more than one.
__device__ __forceinline__ void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// kernel<<<grid, threads, shared, stream>>>(arguments...), allowed to start early where the device
// can do it.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, int shared,
                         const Device& card, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = card.capability >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

}  // namespace pysparse::cuda
