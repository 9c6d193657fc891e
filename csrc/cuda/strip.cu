// Host side of the strip kernels: how a product is cut, which instance runs, and the second pass
// over split sums.
#include "strip.cuh"
#include "strip.h"

namespace pysparse::cuda {
namespace {

// Sums of the parts in a fixed order: same bits in every run.
template <class T>
__global__ __launch_bounds__(256) void add_parts_kernel(const float* parts, Product p, int splits) {
  const int64_t size = static_cast<int64_t>(p.tokens) * p.rows;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  wait_for_inputs();
  if (i >= size) return;
  float sum = p.bias ? widen(static_cast<const T*>(p.bias)[i % p.rows]) : 0.f;
  for (int s = 0; s < splits; ++s) sum += parts[s * size + i];
  static_cast<T*>(p.y)[i] = narrow<T>(sum);
}

struct Plan {
  Cut cut;
  int grid, shared, tiles, resident;  // grid: thread blocks per part
};

// Fills in what follows from a number of parts: how many columns are staged at a time, and the
// thread blocks.
void split(Plan& plan, const Product& p, int splits, int room, int slots) {
  Cut& cut = plan.cut;
  const int team = cut.warps / cut.strips, columns = static_cast<int>(ceil_div(p.cols, kBlockCols));
  cut.blocks = static_cast<int>(ceil_div(ceil_div(columns, splits), team)) * team;
  cut.splits = static_cast<int>(ceil_div(columns, cut.blocks));
  // All inputs of the part at once where they fit, else in equal rounds.
  const int most = max(team, room / (kBlockCols * 2) / team * team);
  const int64_t rounds = ceil_div(cut.blocks, most);
  cut.staged = static_cast<int>(ceil_div(ceil_div(cut.blocks, rounds), team)) * team;
  const int groups = static_cast<int>(ceil_div(ceil_div(p.rows, kStripRows), cut.strips));
  plan.grid = max(1, min(groups, slots / cut.splits));
}

// Steps of the slowest warp: blocks, the sums at a strip's end, inputs, and a second pass over the
// parts.
int64_t cost(const Plan& plan, const Product& p) {
  const Cut& cut = plan.cut;
  const int64_t turns = ceil_div(ceil_div(ceil_div(p.rows, kStripRows), cut.strips), plan.grid);
  const int64_t staging = 1 + p.tokens * cut.staged / 256,
                rounds = ceil_div(cut.blocks, cut.staged);
  return turns * (cut.blocks * cut.strips / cut.warps + 1) +
         (rounds == 1 ? 1 : turns * rounds) * staging + (cut.splits > 1 ? 6 : 0);
}

Plan plan(const StripWeight& w, const Product& p, const Device& card) {
  Plan plan{};
  plan.tiles = p.tokens <= 8 ? 1 : p.tokens <= 16 ? 2 : 4;
  plan.resident = plan.tiles <= 2 ? 2 : 1;
  Cut& cut = plan.cut;
  cut.stage_bytes = static_cast<int>(ceil_div(w.largest_block, kUnitBytes)) * kUnitBytes;
  const int columns = static_cast<int>(ceil_div(p.cols, kBlockCols));
  // 1 KB per thread block is the system's, and the kernel has some static words.
  const int budget = min(card.shared_block, card.shared_total / plan.resident) - 2048;
  const int ring = strip_stages(plan.tiles) * cut.stage_bytes;  // bytes per warp
  // As many warps on a strip as find some blocks of it each.
  cut.warps = kMostWarps, cut.strips = 1;
  while (cut.strips < cut.warps && columns * cut.strips < 2 * cut.warps) cut.strips *= 2;
  const auto room = [&] {
    return (budget - cut.warps * ring - 2 * partial_bytes(cut.warps, p.tokens)) / p.tokens - 16;
  };
  while (cut.warps > 1 && room() < cut.warps / cut.strips * kBlockCols * 2) {
    cut.warps /= 2;
    cut.strips = min(cut.strips, cut.warps);
  }
  Plan best{};
  for (int splits = 1; splits <= 16 && splits <= columns; ++splits) {
    Plan next = plan;
    split(next, p, splits, room(), card.multiprocessors * plan.resident);
    if (!best.grid || cost(next, p) < cost(best, p)) best = next;
  }
  best.shared = cut.warps * ring + p.tokens * staged_stride(best.cut.staged) +
                2 * partial_bytes(cut.warps, p.tokens);
  return best;
}

template <class T>
cudaError_t add_parts(const float* parts, const Product& p, int splits, const Device& card,
                      cudaStream_t stream) {
  const int64_t size = static_cast<int64_t>(p.tokens) * p.rows;
  return launch_early(add_parts_kernel<T>, dim3(static_cast<unsigned>(ceil_div(size, 256))), 256, 0,
                      card, stream, parts, p, splits);
}

}  // namespace

int64_t strip_workspace(const StripWeight& w, const Product& p, int device) {
  Device card{};
  if (p.tokens < 1 || p.tokens > kMostTokens || describe(device, card)) return -1;
  const Cut cut = plan(w, p, card).cut;
  return cut.splits > 1 ? static_cast<int64_t>(cut.splits) * p.tokens * p.rows : 0;
}

int strip_linear(const StripWeight& w, const Product& p, float* workspace, const Target& target) {
  const DeviceGuard guard(target.device);
  Device card{};
  if (guard.error()) return guard.error();
  if (const cudaError_t error = describe(target.device, card)) return error;
  if (p.rows == 0 || p.tokens == 0) return cudaSuccess;
  if (p.tokens > kMostTokens) return cudaErrorInvalidValue;
  const Plan choice = plan(w, p, card);
  if (choice.shared > card.shared_block || (choice.cut.splits > 1 && !workspace))
    return cudaErrorInvalidValue;
  const StripLaunch launch{w,
                           p,
                           choice.cut,
                           workspace,
                           choice.grid,
                           choice.shared,
                           choice.tiles,
                           card,
                           stream_of(target)};
  const cudaError_t error =
      w.packing == Packing::kFragment ? launch_fragment(launch) : launch_pair(launch);
  if (error || choice.cut.splits == 1) return error;
  return p.dtype == DType::kBFloat16
             ? add_parts<__nv_bfloat16>(workspace, p, choice.cut.splits, card, launch.stream)
             : add_parts<__half>(workspace, p, choice.cut.splits, card, launch.stream);
}

int strip_unpack(const StripWeight& w, const Rows& r, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  if (r.rows == 0 || r.cols == 0) return cudaSuccess;
  return w.packing == Packing::kFragment ? unpack_fragment(w, r, stream_of(target))
                                         : unpack_pair(w, r, stream_of(target));
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int shared_bytes(int device) {
  Device card{};
  return describe(device, card) == cudaSuccess ? card.shared_block : 0;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace pysparse::cuda
