#pragma once
// Between the host side of the strip kernels and their instances: one source per packing.
#include <cuda_runtime.h>

#include "strip.cuh"

namespace pysparse::cuda {

// Slots of a warp's ring. With more tokens fewer thread blocks fit, so each keeps more copies under
// way; with most of them, the inputs and sums need the room.
constexpr int strip_stages(int tiles) { return tiles == 4 ? 4 : 3; }

struct StripLaunch {
  StripWeight weight;
  Product product;
  Cut cut;
  float* workspace;
  int grid, shared, tiles;
  Device card;
  cudaStream_t stream;
};

cudaError_t launch_fragment(const StripLaunch& launch);
cudaError_t launch_pair(const StripLaunch& launch);
cudaError_t unpack_fragment(const StripWeight& weight, const Rows& rows, cudaStream_t stream);
cudaError_t unpack_pair(const StripWeight& weight, const Rows& rows, cudaStream_t stream);

template <class Tile, class T, int kTiles>
cudaError_t launch_instance(const StripLaunch& l) {
  auto *kernel = strip_linear_kernel < Tile, T, kTiles, strip_stages(kTiles),
       kTiles <= 2 ? 2 : 1 > ;
  const cudaError_t error = allow_shared(kernel, l.shared);
  if (error) return error;
  const dim3 grid(static_cast<unsigned>(l.grid), static_cast<unsigned>(l.cut.splits));
  return launch_early(kernel, grid, l.cut.warps * kLanes, l.shared, l.card, l.stream, l.weight,
                      l.product, l.cut, l.workspace);
}

template <class Tile, class T>
cudaError_t launch_tiles(const StripLaunch& l) {
  switch (l.tiles) {
    case 1:
      return launch_instance<Tile, T, 1>(l);
    case 2:
      return launch_instance<Tile, T, 2>(l);
    case 4:
      return launch_instance<Tile, T, 4>(l);
    default:
      return launch_instance<Tile, T, 8>(l);
  }
}

template <class Tile>
cudaError_t launch_tile(const StripLaunch& l) {
  return l.product.dtype == DType::kBFloat16 ? launch_tiles<Tile, __nv_bfloat16>(l)
                                             : launch_tiles<Tile, __half>(l);
}

template <class Tile>
cudaError_t unpack_tile(const StripWeight& weight, const Rows& rows, cudaStream_t stream) {
  const int64_t blocks = ceil_div(rows.rows, kStripRows) * ceil_div(rows.cols, kBlockCols);
  strip_unpack_kernel<Tile>
      <<<static_cast<unsigned>(ceil_div(blocks, kUnpackWarps)), kUnpackWarps * kLanes, 0, stream>>>(
          weight, rows);
  return cudaGetLastError();
}

}  // namespace pysparse::cuda
