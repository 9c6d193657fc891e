#include "bind.h"
#include "pysparse/norm.h"

namespace pysparse {
namespace {

void call_rms_norm(int dtype, uintptr_t x, int64_t rows, int64_t cols, uintptr_t weight, float eps,
                   int form, uintptr_t y) {
  check(form >= 0 && form < kNormForms, "unknown form code ", form);
  const NormView norm{pointer<const void>(weight), cols, eps, static_cast<NormForm>(form),
                      dtype_of(dtype)};
  rms_norm(norm, pointer<const void>(x), rows, pointer<void>(y));
}

}  // namespace

void bind_norm(pybind11::module_& module) { module.def("rms_norm", &call_rms_norm, ReleaseGil()); }

}  // namespace pysparse
