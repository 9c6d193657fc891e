#pragma once
// Python passes addresses as integers: the module knows neither torch nor NumPy.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "pysparse/dtype.h"
#include "pysparse/error.h"

namespace pysparse {

void bind_bayes(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_formats(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_fused(pybind11::module_& module);
void bind_int8(pybind11::module_& module);
void bind_device_formats(pybind11::module_& module);
void bind_kernels(pybind11::module_& module);
void bind_linear(pybind11::module_& module);
void bind_lowrank(pybind11::module_& module);
void bind_nm(pybind11::module_& module);
void bind_norm(pybind11::module_& module);
void bind_pruning(pybind11::module_& module);
void bind_shapley(pybind11::module_& module);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(int code) {
  check(code >= 0 && code < kDTypes, "unknown dtype code ", code);
  return static_cast<DType>(code);
}

using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace pysparse
