// Host side of the Shapley kernels: check, grid, launch.
#include "shapley.cuh"

namespace pysparse::cuda {
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff;

bool sound(const ShapleyDraw& d) {
  return d.rows >= 0 && d.cols >= 0 && d.cols <= int64_t{1} << 24 && d.visit < Stream::kVisits &&
         d.first <= Stream::kSamples && static_cast<uint64_t>(d.rows) <= Stream::kSamples - d.first;
}

cudaError_t launch_words(const ShapleyDraw& draw, bool partners, uint32_t* words,
                         cudaStream_t stream) {
  const int64_t blocks = ceil_div(draw.rows * ceil_div(draw.cols, 4), kDrawThreads);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  words_kernel<<<static_cast<unsigned>(blocks), kDrawThreads, 0, stream>>>(draw, partners, words);
  return cudaGetLastError();
}

}  // namespace

int shapley_words(const ShapleyDraw& draw, uint32_t* words, const Target& target) {
  if (!sound(draw)) return cudaErrorInvalidValue;
  if (draw.rows == 0 || draw.cols == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  return launch_words(draw, false, words, stream_of(target));
}

int shapley_permutations(const ShapleyDraw& draw, uint32_t* room, int32_t* orders,
                         const Target& target) {
  if (!sound(draw)) return cudaErrorInvalidValue;
  if (draw.rows == 0 || draw.cols == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  if (const cudaError_t error = launch_words(draw, true, room, stream_of(target))) return error;
  swap_kernel<<<static_cast<unsigned>(ceil_div(draw.rows, kDrawThreads)), kDrawThreads, 0,
                stream_of(target)>>>(draw.rows, draw.cols, room, orders);
  return cudaGetLastError();
}

int64_t fm_walk_bytes(int fields, int cols) { return walk_bytes(fields, cols); }

int fm_marginals(const FmSamples& v, const FmOrders& orders, float* marginals, uint32_t* peak,
                 const Target& target) {
  if (v.samples < 0 || v.fields < 1 || v.cols < 1 || v.cols > kMaxEmbedding ||
      static_cast<int64_t>(v.fields) * padded_width(v.cols) > kMaxPaddedPlayers)
    return cudaErrorInvalidValue;
  if (v.samples == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  Device card{};
  if (const cudaError_t error = describe(target.device, card)) return error;
  const int64_t bytes = walk_bytes(v.fields, v.cols);
  if (bytes > card.shared_block) return cudaErrorInvalidValue;
  int warps = kWalkWarps;
  while (warps * bytes > card.shared_block) warps /= 2;
  const int shared = static_cast<int>(warps * bytes);
  if (const cudaError_t error = allow_shared(fm_walk_kernel, shared)) return error;
  const int64_t blocks = ceil_div(v.samples, warps);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  fm_walk_kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kLanes), shared,
                   stream_of(target)>>>(v, orders, marginals, peak);
  return cudaGetLastError();
}

int add_marginals(const float* marginals, const int32_t* ids, int64_t samples, int fields, int cols,
                  const MarginalSums& totals, const Target& target) {
  if (samples < 0 || fields < 1 || cols < 1) return cudaErrorInvalidValue;
  const int64_t count = samples * fields * cols, blocks = ceil_div(count, kDrawThreads);
  if (count == 0) return cudaSuccess;
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  add_kernel<<<static_cast<unsigned>(blocks), kDrawThreads, 0, stream_of(target)>>>(
      marginals, ids, count, cols, totals);
  return cudaGetLastError();
}

}  // namespace pysparse::cuda
