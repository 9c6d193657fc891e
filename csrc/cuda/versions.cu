// Which CUDA the driver supports and which one these kernels were built with.
#include <cuda_runtime.h>

#include "versions.h"

namespace pysparse::cuda {

Versions versions() {
  Versions found{};
  // The driver's stays 0 where there is none.
  if (cudaDriverGetVersion(&found.driver)) found.driver = 0;
  if (cudaRuntimeGetVersion(&found.runtime)) found.runtime = CUDART_VERSION;
  return found;
}

}  // namespace pysparse::cuda
