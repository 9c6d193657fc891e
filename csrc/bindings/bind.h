#pragma once
// Python passes addresses as integers: the module knows neither torch nor NumPy.
#include <pybind11/pybind11.h>

#include <cstdint>

namespace pysparse {

void bind_formats(pybind11::module_& module);
void bind_device_formats(pybind11::module_& module);
void bind_kernels(pybind11::module_& module);
void bind_linear(pybind11::module_& module);

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using ReleaseGil = pybind11::call_guard<pybind11::gil_scoped_release>;

}  // namespace pysparse
