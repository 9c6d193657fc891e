#include "bind.h"

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled kernels of pysparse; see pysparse/_core.pyi";
  pysparse::bind_bayes(module);
  pysparse::bind_embedding(module);
  pysparse::bind_formats(module);
  pysparse::bind_fused(module);
  pysparse::bind_int8(module);
  pysparse::bind_device_formats(module);
  pysparse::bind_kernels(module);
  pysparse::bind_attention(module);
  pysparse::bind_linear(module);
  pysparse::bind_lowrank(module);
  pysparse::bind_nm(module);
  pysparse::bind_norm(module);
  pysparse::bind_pruning(module);
  pysparse::bind_shapley(module);
}
