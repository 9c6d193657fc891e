// Code that the runtime compiler made for a GPU which this build has none for (pysparse/nvrtc.py).
// The linker turns the module's calls of three functions of the runtime into calls of the __wrap_
// ones below (--wrap, see CMakeLists.txt), so host code plans and launches as always and no
// kernel's source knows of it.
#include <cuda_runtime.h>

#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "kernel_name.h"

#if CUDART_VERSION >= 13000
#define PYSPARSE_REAL_LAUNCH __real___cudaLaunchKernel
#define PYSPARSE_WRAP_LAUNCH __wrap___cudaLaunchKernel
#else
#define PYSPARSE_REAL_LAUNCH __real_cudaLaunchKernel
#define PYSPARSE_WRAP_LAUNCH __wrap_cudaLaunchKernel
#endif
#include "machine_code.h"

namespace pysparse::cuda {
namespace {

struct DeviceCode {
  std::unordered_map<std::string, const void*> by_name;    // plain name -> cudaKernel_t
  std::unordered_map<const void*, const void*> by_kernel;  // what launches name -> cudaKernel_t
};

std::atomic<bool> any_code{false};
std::shared_mutex guard;
std::unordered_map<int, DeviceCode> devices;

cudaError_t name_of(const void* kernel, std::string& name) {
  const char* text = nullptr;
  const cudaError_t error = cudaFuncGetName(&text, kernel);
  if (!error) name = plain_kernel_name(text);
  return error;
}

// What to launch for `kernel` on the current device: loaded code, or the kernel itself.
const void* replacement(const void* kernel) {
  int device = 0;
  if (!any_code.load(std::memory_order_acquire) || cudaGetDevice(&device)) return kernel;
  {
    const std::shared_lock<std::shared_mutex> lock(guard);
    const auto code = devices.find(device);
    if (code == devices.end()) return kernel;
    const auto known = code->second.by_kernel.find(kernel);
    if (known != code->second.by_kernel.end()) return known->second;
  }
  std::string name;
  if (name_of(kernel, name)) return kernel;
  const std::unique_lock<std::shared_mutex> lock(guard);
  DeviceCode& code = devices[device];
  const auto found = code.by_name.find(name);
  return code.by_kernel[kernel] = found == code.by_name.end() ? kernel : found->second;
}

}  // namespace

int load_code(const void* image, int device, int* kernels) {
  cudaLibrary_t library = nullptr;  // never unloaded: a launch may come at any time
  unsigned count = 0;
  cudaError_t error =
      cudaLibraryLoadData(&library, image, nullptr, nullptr, 0, nullptr, nullptr, 0);
  if (error) return error;
  if ((error = cudaLibraryGetKernelCount(&count, library))) return error;
  std::vector<cudaKernel_t> found(count);
  if ((error = cudaLibraryEnumerateKernels(found.data(), count, library))) return error;
  const std::unique_lock<std::shared_mutex> lock(guard);
  DeviceCode& code = devices[device];
  for (const cudaKernel_t kernel : found) {
    std::string name;
    if ((error = name_of(kernel, name))) return error;
    code.by_name[name] = kernel;
  }
  code.by_kernel.clear();  // looked up again, now that there is more to find
  any_code.store(true, std::memory_order_release);
  *kernels = static_cast<int>(count);
  return cudaSuccess;
}

}  // namespace pysparse::cuda

extern "C" {

cudaError_t __real_cudaFuncSetAttribute(const void*, cudaFuncAttribute, int);
cudaError_t __wrap_cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute name, int value) {
  return __real_cudaFuncSetAttribute(pysparse::cuda::replacement(kernel), name, value);
}

cudaError_t __real_cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**);
cudaError_t __wrap_cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                       void** arguments) {
  return __real_cudaLaunchKernelExC(config, pysparse::cuda::replacement(kernel), arguments);
}

// What <<<...>>> calls, from CUDA 13 on and before.
cudaError_t PYSPARSE_REAL_LAUNCH(const void*, dim3, dim3, void**, size_t, cudaStream_t);
cudaError_t PYSPARSE_WRAP_LAUNCH(const void* kernel, dim3 grid, dim3 block, void** arguments,
                                 size_t shared, cudaStream_t stream) {
  return PYSPARSE_REAL_LAUNCH(pysparse::cuda::replacement(kernel), grid, block, arguments, shared,
                              stream);
}

}  // extern "C"
