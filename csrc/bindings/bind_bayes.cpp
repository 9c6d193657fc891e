#include "bind.h"
#include "pysparse/ridge.h"

namespace pysparse {

void bind_bayes(pybind11::module_& module) {
  module.attr("RIDGE_MAX") = kRidgeMax;
  module.def(
      "ridge_rows",
      [](uintptr_t gram, uintptr_t scale, uintptr_t target, uintptr_t solution,
         uintptr_t inverse_diagonal, int64_t rows, int size) {
        ridge_rows({pointer<const float>(gram), pointer<const float>(scale),
                    pointer<const float>(target), pointer<float>(solution),
                    pointer<float>(inverse_diagonal), rows, size, size});
      },
      ReleaseGil());
}

}  // namespace pysparse
