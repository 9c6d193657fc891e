#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bind.h"
#include "pysparse/kernel_table.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

// (op, format, dtype, isa, supported), by op, format, dtype, and then the best level first.
auto list_kernels() {
  std::vector<KernelEntry> sorted = kernels();
  std::sort(sorted.begin(), sorted.end(), [](const KernelEntry& a, const KernelEntry& b) {
    const auto key = [](const KernelEntry& e) {
      return std::tuple{std::string_view{e.op}, std::string_view{e.format}, e.dtype, -e.isa->rank};
    };
    return key(a) < key(b);
  });
  std::vector<std::tuple<std::string, std::string, std::string, std::string, bool>> rows;
  for (const KernelEntry& e : sorted)
    rows.emplace_back(e.op, e.format, name(e.dtype), e.isa->name, e.isa->supported());
  return rows;
}

auto list_isa_levels() {
  std::vector<const IsaLevel*> sorted = isa_levels();
  std::sort(sorted.begin(), sorted.end(),
            [](const IsaLevel* a, const IsaLevel* b) { return a->rank < b->rank; });
  std::vector<std::pair<std::string, bool>> rows;
  for (const IsaLevel* level : sorted) rows.emplace_back(level->name, level->supported());
  return rows;
}

}  // namespace

void bind_kernels(pybind11::module_& module) {
  module.def("kernels", &list_kernels);
  module.def("isa_levels", &list_isa_levels);
  module.def("force_isa", [](const std::string& level) { force_isa(level); });
  module.def("forced_isa", &forced_isa);
  module.def("active_isa", &active_isa);
  module.def("num_threads", &num_threads);
  module.def("selected", [](const std::string& op, const std::string& format, int dtype) {
    return std::string(best_kernel(op, format, static_cast<DType>(dtype))->isa->name);
  });
}

}  // namespace pysparse
