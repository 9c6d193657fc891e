// The strip kernels for two-of-four weights on the sparse tensor cores.
#include "strip.h"
#include "tiles.cuh"

namespace pysparse::cuda {

cudaError_t launch_pair(const StripLaunch& launch) { return launch_tile<PairTile>(launch); }

cudaError_t unpack_pair(const StripWeight& weight, const Rows& rows, cudaStream_t stream) {
  return unpack_tile<PairTile>(weight, rows, stream);
}

}  // namespace pysparse::cuda
