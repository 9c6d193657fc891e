// Runs the strip kernels on host threads with the plan that the library would make for a given card.
#include "strip_host.cuh"

#include "strip_instances.h"
#include "tiles.cuh"

namespace pysparse::cuda {
alignas(16) char shared[1 << 18];  // a thread block's dynamic shared memory

namespace {
template <class Tile, class T, int kTiles>
void run(const StripWeight& w, const Product& p, const Plan& plan, float* workspace) {
  std::memset(shared, 0xff, sizeof(shared));  // what was not staged is NaN
  shim::launch(plan.grid, plan.cut.splits, plan.cut.warps * kLanes, [&] {
    strip_linear_kernel<Tile, T, kTiles, strip_stages(kTiles), 1>(w, p, plan.cut, workspace);
  });
  if (plan.cut.splits > 1)
    shim::launch(static_cast<int>(ceil_div(int64_t{p.tokens} * p.rows, 256)), 1, 256,
                 [&] { add_parts_kernel<T>(workspace, p, plan.cut.splits); });
}

template <class Tile, class T>
void run_tiles(const StripWeight& w, const Product& p, const Plan& plan, float* workspace) {
  if (plan.tiles == 1) run<Tile, T, 1>(w, p, plan, workspace);
  else if (plan.tiles == 2) run<Tile, T, 2>(w, p, plan, workspace);
  else if (plan.tiles == 4) run<Tile, T, 4>(w, p, plan, workspace);
  else run<Tile, T, 8>(w, p, plan, workspace);
}
}  // namespace
}  // namespace pysparse::cuda

using namespace pysparse::cuda;

// Fills `cut` with {warps, strips, splits, blocks, staged, shared bytes, thread blocks}; card is {processors, threads, per block, total}.
extern "C" void plan_strips(const int* card, int packing, int largest, int tokens, int rows, int cols, int* cut) {
  const StripWeight w{nullptr, nullptr, largest, static_cast<Packing>(packing)};
  const Product p{nullptr, nullptr, nullptr, tokens, rows, cols, DType::kBFloat16};
  const Plan made = plan(w, p, {card[0], card[1], card[2], card[3], 9});
  const int result[7] = {made.cut.warps, made.cut.strips, made.cut.splits, made.cut.blocks, made.cut.staged, made.shared, made.grid};
  std::copy(result, result + 7, cut);
}

extern "C" void run_strips(const int* card, int packing, int dtype, const uint8_t* stream, const int32_t* offsets,
                           int largest, const void* x, const void* bias, void* y, int tokens, int rows, int cols,
                           float* workspace) {
  const StripWeight w{stream, offsets, largest, static_cast<Packing>(packing)};
  const Product p{x, bias, y, tokens, rows, cols, static_cast<DType>(dtype)};
  const Plan made = plan(w, p, {card[0], card[1], card[2], card[3], 9});
  if (packing == 0) {
    if (dtype == 0) run_tiles<FragmentTile, __nv_bfloat16>(w, p, made, workspace);
    else run_tiles<FragmentTile, __half>(w, p, made, workspace);
  } else {
    if (dtype == 0) run_tiles<PairTile, __nv_bfloat16>(w, p, made, workspace);
    else run_tiles<PairTile, __half>(w, p, made, workspace);
  }
}

extern "C" void unpack_strips(int packing, const uint8_t* stream, const int32_t* offsets, void* dense, int first_row,
                              int part_rows, int rows, int cols) {
  const StripWeight w{stream, offsets, 0, static_cast<Packing>(packing)};
  const Rows r{dense, first_row, part_rows, rows, cols};
  const int blocks = static_cast<int>(ceil_div(ceil_div(part_rows, kStripRows) * ceil_div(cols, kBlockCols), 8));
  shim::launch(blocks, 1, 256, [&] {
    if (packing == 0) strip_unpack_kernel<FragmentTile>(w, r);
    else strip_unpack_kernel<PairTile>(w, r);
  });
}
