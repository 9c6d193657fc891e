#pragma once
// What the bindings of _cuda share: addresses and sizes in, an exception for any CUDA error out.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "api.h"

namespace pysparse::cuda {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline int narrow_size(int64_t size, const char* name) {
  if (size < 0 || size > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument(std::string(name) + " is " + std::to_string(size) +
                                ", outside [0, 2^31)");
  return static_cast<int>(size);
}

inline void check(int error, const char* kernel) {
  if (error)
    throw std::runtime_error(std::string("CUDA kernel ") + kernel + " failed: " +
                             error_text(error) + " (error " + std::to_string(error) + ")");
}

void bind_attention(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_pruning(pybind11::module_& module);
void bind_shapley(pybind11::module_& module);

}  // namespace pysparse::cuda
