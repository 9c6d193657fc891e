// Host side of the strip kernels: how a product is cut, which instance runs, and the second pass over split sums.
#include "strip.h"

#include "strip.cuh"

namespace pysparse::cuda {
namespace {

// Sums of the parts in a fixed order: same bits in every run.
template <class T>
__global__ __launch_bounds__(256) void add_parts_kernel(const float* parts, Product p, int splits) {
  const int64_t size = static_cast<int64_t>(p.tokens) * p.rows;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= size) return;
  float sum = p.bias ? widen(static_cast<const T*>(p.bias)[i % p.rows]) : 0.f;
  for (int s = 0; s < splits; ++s) sum += parts[s * size + i];
  static_cast<T*>(p.y)[i] = narrow<T>(sum);
}

// Splits of the columns: the fewest rounds of thread blocks, counted in steps of the slowest warp. Each round
// costs some two steps of filling the ring, a second pass some four.
int choose_splits(int thread_blocks, int columns, int team, int slots) {
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int s = 1; s <= 16 && s <= columns; ++s) {
    const int64_t rounds = ceil_div(static_cast<int64_t>(thread_blocks) * s, slots);
    const int64_t cost = rounds * (ceil_div(ceil_div(columns, s), team) + 2) + (s > 1 ? 4 : 0);
    if (cost < best_cost) best = s, best_cost = cost;
  }
  return best;
}



struct Plan {
  Cut cut;
  int shared, tiles, resident;
};

Plan plan(const StripWeight& w, const Product& p, const Device& card) {
  Plan plan{};
  plan.tiles = p.tokens <= 8 ? 1 : p.tokens <= 16 ? 2 : p.tokens <= 32 ? 4 : 8;
  plan.resident = plan.tiles <= 2 ? 2 : 1;
  Cut& cut = plan.cut;
  // Strips per thread block share the staged inputs: the more tokens, the more it matters.
  cut.strips = p.tokens <= 2 ? 1 : plan.tiles == 1 ? 2 : plan.tiles == 2 ? 4 : 8;
  cut.stage_bytes = static_cast<int>(ceil_div(w.largest_block, kUnitBytes)) * kUnitBytes;
  const int columns = static_cast<int>(ceil_div(p.cols, kBlockCols));
  // 1 KB per thread block is the system's, and the kernel has some static words.
  const int budget = min(card.shared_block, card.shared_total / plan.resident) - 2048;
  const int ring = strip_stages(plan.tiles) * cut.stage_bytes;  // bytes per warp
  cut.warps = most_warps(plan.tiles);
  while (cut.warps > cut.strips && cut.warps * ring > budget - p.tokens * staged_stride(cut.warps / cut.strips))
    cut.warps /= 2;
  const int team = cut.warps / cut.strips;
  const int room = (budget - cut.warps * ring) / p.tokens - 16;
  const int thread_blocks = static_cast<int>(ceil_div(ceil_div(p.rows, kStripRows), cut.strips));
  cut.splits = choose_splits(thread_blocks, columns, team, card.multiprocessors * plan.resident);
  cut.blocks = static_cast<int>(ceil_div(ceil_div(columns, cut.splits), team)) * team;
  cut.splits = static_cast<int>(ceil_div(columns, cut.blocks));
  // All inputs of the part at once where they fit, else in equal rounds.
  const int most = max(team, room / (kBlockCols * 2) / team * team);
  const int64_t rounds = max(int64_t{1}, ceil_div(cut.blocks, most));
  cut.staged = max(team, static_cast<int>(ceil_div(ceil_div(cut.blocks, rounds), team)) * team);
  const int partial = cut.warps * plan.tiles * 4 * kLanes * static_cast<int>(sizeof(float));
  plan.shared = max(cut.warps * ring + p.tokens * staged_stride(cut.staged), partial);
  return plan;
}

template <class T>
cudaError_t add_parts(const float* parts, const Product& p, int splits, cudaStream_t stream) {
  const int64_t size = static_cast<int64_t>(p.tokens) * p.rows;
  add_parts_kernel<T><<<static_cast<unsigned>(ceil_div(size, 256)), 256, 0, stream>>>(parts, p, splits);
  return cudaGetLastError();
}

}  // namespace

int64_t strip_workspace(const StripWeight& w, const Product& p, int device) {
  Device card{};
  if (p.tokens < 1 || p.tokens > 64 || describe(device, card)) return -1;
  const Cut cut = plan(w, p, card).cut;
  return cut.splits > 1 ? static_cast<int64_t>(cut.splits) * p.tokens * p.rows : 0;
}

int strip_linear(const StripWeight& w, const Product& p, float* workspace, const Target& target) {
  const DeviceGuard guard(target.device);
  Device card{};
  if (guard.error()) return guard.error();
  if (const cudaError_t error = describe(target.device, card)) return error;
  if (p.rows == 0 || p.tokens == 0) return cudaSuccess;
  if (p.tokens > 64) return cudaErrorInvalidValue;
  const Plan choice = plan(w, p, card);
  if (choice.shared > card.shared_block || (choice.cut.splits > 1 && !workspace)) return cudaErrorInvalidValue;
  const StripLaunch launch{w, p, choice.cut, workspace, choice.shared, choice.tiles, stream_of(target)};
  const cudaError_t error = w.packing == Packing::kFragment ? launch_fragment(launch) : launch_pair(launch);
  if (error || choice.cut.splits == 1) return error;
  return p.dtype == DType::kBFloat16 ? add_parts<__nv_bfloat16>(workspace, p, choice.cut.splits, launch.stream)
                                     : add_parts<__half>(workspace, p, choice.cut.splits, launch.stream);
}

int strip_unpack(const StripWeight& w, const Rows& r, const Target& target) {
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  if (r.rows == 0 || r.cols == 0) return cudaSuccess;
  return w.packing == Packing::kFragment ? unpack_fragment(w, r, stream_of(target)) : unpack_pair(w, r, stream_of(target));
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
