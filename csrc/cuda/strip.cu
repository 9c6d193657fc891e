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

// Bytes of x that one thread block stages in the time of one step, when all of them do: a step
// takes 32 warps some 1200 ns, in which the second-level cache brings a multiprocessor some 140 KB.
constexpr int kStepBytes = 70 << 10;

// Cuts columns into `splits` parts and rows into groups of `strips` strips; `room`: bytes of shared
// memory for x.
void cut_up(Plan& plan, const Product& p, int strips, int splits, int room, int slots) {
  Cut& cut = plan.cut;
  cut.strips = strips;
  const int team = cut.warps / strips, columns = static_cast<int>(ceil_div(p.cols, kBlockCols));
  cut.blocks = static_cast<int>(ceil_div(ceil_div(columns, splits), team)) * team;
  cut.splits = static_cast<int>(ceil_div(columns, cut.blocks));
  // All inputs of the part at once where they fit, else in equal rounds.
  const int most = max(team, (room / p.tokens - 16) / (kBlockCols * 2) / team * team);
  const int64_t rounds = ceil_div(cut.blocks, most);
  cut.staged = static_cast<int>(ceil_div(ceil_div(cut.blocks, rounds), team)) * team;
  plan.grid = max(
      1, min(static_cast<int>(ceil_div(ceil_div(p.rows, kStripRows), strips)), slots / cut.splits));
}

// Hundredths of a step that the slowest thread block takes: blocks, sums at a group's end, rounds
// of inputs (once, or for each group where they do not all fit), and a second pass over the parts,
// which reads and writes at some 6 MB a step. Pairs wait for memory, which all thread blocks share;
// bitmaps for the multiprocessor, which only its own share.
int64_t cost(const Plan& plan, const StripWeight& w, const Product& p, int multiprocessors) {
  const Cut& cut = plan.cut;
  const int64_t groups = ceil_div(ceil_div(p.rows, kStripRows), cut.strips);
  const int64_t turns = ceil_div(groups, plan.grid), rounds = ceil_div(cut.blocks, cut.staged);
  const int blocks = plan.grid * cut.splits;
  const int64_t load = w.packing == Packing::kPair ? 100 * blocks / multiprocessors
                                                   : 100 * ceil_div(blocks, multiprocessors);
  const int64_t step = max(int64_t{40}, load / plan.resident);
  const int64_t inputs =
      70 * rounds + int64_t{100} * p.tokens * cut.blocks * kBlockCols * 2 / kStepBytes;
  const int64_t parts = int64_t{cut.splits} * p.tokens * p.rows * 8 / 60000;
  return turns * (step * cut.blocks * cut.strips / cut.warps + 40) +
         (rounds > 1 ? turns : 1) * inputs + (cut.splits > 1 ? 200 + parts : 0);
}

Plan plan(const StripWeight& w, const Product& p, const Device& card) {
  Plan plan{};
  plan.tiles = p.tokens <= 8 ? 1 : p.tokens <= 16 ? 2 : p.tokens <= 32 ? 4 : 8;
  plan.resident = plan.tiles <= 2 ? 2 : 1;
  Cut& cut = plan.cut;
  cut.stage_bytes = static_cast<int>(ceil_div(w.largest_block, kUnitBytes)) * kUnitBytes;
  const int columns = static_cast<int>(ceil_div(p.cols, kBlockCols)),
            slots = card.multiprocessors * plan.resident;
  // 1 KB per thread block is the system's, and the kernel has some static words.
  const int budget = min(card.shared_block, card.shared_total / plan.resident) - 2048;
  cut.warps = kMostWarps;
  const auto own = [&] {
    return cut.warps * strip_stages(plan.tiles) * cut.stage_bytes +
           partial_buffers(plan.tiles) * partial_bytes(cut.warps, p.tokens);
  };
  while (cut.warps > 1 && own() + p.tokens * staged_stride(1) > budget) cut.warps /= 2;
  const int room = budget - own();
  Plan best{};
  for (int strips = 1; strips <= cut.warps; strips *= 2)
    for (int splits = 1; splits <= 16 && splits <= columns; ++splits) {
      Plan next = plan;
      cut_up(next, p, strips, splits, room, slots);
      const bool fits = p.tokens * staged_stride(next.cut.staged) <= room;
      if (fits && (!best.grid ||
                   cost(next, w, p, card.multiprocessors) < cost(best, w, p, card.multiprocessors)))
        best = next;
    }
  best.shared = own() + p.tokens * staged_stride(best.cut.staged);
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
