// The strip kernels for bitmaps in the order of tensor-core operands.
#include "strip.h"
#include "tiles.cuh"

namespace pysparse::cuda {

cudaError_t launch_fragment(const StripLaunch& launch) { return launch_tile<FragmentTile>(launch); }

cudaError_t unpack_fragment(const StripWeight& weight, const Rows& rows, cudaStream_t stream) {
  return unpack_tile<FragmentTile>(weight, rows, stream);
}

}  // namespace pysparse::cuda
