#pragma once
// Kernels in unnamed namespaces carry a mark of their file in their mangled names, and every
// compiler makes its own. Without it the names agree.
#include <string>

namespace pysparse::cuda {

// "_ZN1a40_GLOBAL__N__74097db6_8_delta_cu_d976c1491kEv" -> "_ZN1a1kEv": drops such components, each
// a length and as many characters.
inline std::string plain_kernel_name(std::string name) {
  size_t mark;
  while ((mark = name.find("_GLOBAL__N_")) != std::string::npos) {
    size_t first = mark;
    while (first > 0 && name[first - 1] >= '0' && name[first - 1] <= '9') --first;
    if (first == mark) break;  // no component of a mangled name
    name.erase(first, mark - first + std::stoul(name.substr(first, mark - first)));
  }
  return name;
}

}  // namespace pysparse::cuda
