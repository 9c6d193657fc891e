// Host side of selection and sweep: check, grid, launch.
#include "pruning.cuh"

namespace pysparse::cuda {
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff;

bool sound(const ScoredMatrix& m, const Chosen& out) {
  return m.rows >= 0 && m.cols >= 0 && m.stride >= m.cols && out.stride >= m.cols &&
         m.rows * ceil_div(m.cols, kLanes) * kLanes / kNmThreads < kMostBlocks;
}

template <class T>
cudaError_t launch_rows(const ScoredMatrix& m, int64_t count, bool joint, const Chosen& out,
                        Damage* damage, cudaStream_t stream) {
  if (joint)
    select_rows_kernel<T, true><<<1, kJointThreads, 0, stream>>>(m, count, out, damage);
  else
    select_rows_kernel<T, false>
        <<<static_cast<unsigned>(m.rows), kSelectThreads, 0, stream>>>(m, count, out, damage);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_nm(const ScoredMatrix& m, int n, int group, const Chosen& out, Damage* damage,
                      cudaStream_t stream) {
  const bool neighbours = kLanes % group == 0;
  const int64_t threads = neighbours ? m.rows * ceil_div(m.cols, kLanes) * kLanes : m.rows * m.cols;
  const auto blocks = static_cast<unsigned>(ceil_div(threads, kNmThreads));
  if (neighbours)
    select_nm_kernel<T><<<blocks, kNmThreads, 0, stream>>>(m, n, group, out, damage);
  else
    select_any_kernel<T><<<blocks, kNmThreads, 0, stream>>>(m, n, group, out, damage);
  return cudaGetLastError();
}

// Calls launch with a value of the entries' type.
template <class Launch>
cudaError_t by_entry(Entry entry, const Launch& launch) {
  switch (entry) {
    case Entry::kFloat32:
      return launch(float{});
    case Entry::kBFloat16:
      return launch(__nv_bfloat16{});
    case Entry::kFloat16:
      return launch(__half{});
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_strip(const ObsSweep& s, const StripView& strip, float* errors,
                         cudaStream_t stream) {
  const auto rows = static_cast<unsigned>(ceil_div(s.rows, kSweepWarps));
  sweep_kernel<<<rows, kSweepWarps * kLanes, 0, stream>>>(s, strip, errors);
  if (const cudaError_t error = cudaGetLastError()) return error;
  const int64_t right = s.cols - strip.first - strip.depth;
  if (right == 0) return cudaSuccess;
  const dim3 tiles(static_cast<unsigned>(ceil_div(right, kTile)),
                   static_cast<unsigned>(ceil_div(s.rows, kTile)));
  update_kernel<<<tiles, kUpdateThreads, 0, stream>>>(s, strip, errors);
  return cudaGetLastError();
}

// The mask of one block of columns, by the weights as they are now.
cudaError_t launch_mask(const ObsSweep& s, int64_t first, int64_t width, int64_t count,
                        Damage* damage, cudaStream_t stream) {
  const ScoredMatrix block{s.weight + first, s.scale + first, s.rows, width,
                           s.cols,           Entry::kFloat32};
  return launch_rows<float>(block, count, s.joint, {s.keep + first, nullptr, s.cols}, damage,
                            stream);
}

bool sound(const ObsSweep& s) {
  if (s.rows < 0 || s.cols < 0 || s.block < 1 || ceil_div(s.rows, kTile) > 65535) return false;
  return s.n > 0 ? s.n < s.m && s.m <= kLongest && s.block % s.m == 0 : s.counts != nullptr;
}

}  // namespace

int select_rows(const ScoredMatrix& m, int64_t count, bool joint, const Chosen& out, Damage* damage,
                const Target& target) {
  if (!sound(m, out) || count < 0 || count > (joint ? m.rows * m.cols : m.cols))
    return cudaErrorInvalidValue;
  if (m.rows == 0 || m.cols == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  return by_entry(m.entry, [&](auto entry) {
    return launch_rows<decltype(entry)>(m, count, joint, out, damage, stream_of(target));
  });
}

int select_nm(const ScoredMatrix& m, int n, int group, const Chosen& out, Damage* damage,
              const Target& target) {
  if (!sound(m, out) || n < 1 || n >= group || group > kLongest) return cudaErrorInvalidValue;
  if (m.rows == 0 || m.cols == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  return by_entry(m.entry, [&](auto entry) {
    return launch_nm<decltype(entry)>(m, n, group, out, damage, stream_of(target));
  });
}

int obs_sweep(const ObsSweep& s, float* errors, Damage* damage, const Target& target) {
  if (!sound(s)) return cudaErrorInvalidValue;
  if (s.rows == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  const int longest = s.n > 0 ? kObsStrip / s.m * s.m : kObsStrip;  // whole groups
  for (int64_t first = 0; first < s.cols; first += s.block) {
    const int64_t end = first + s.block < s.cols ? first + s.block : s.cols;
    if (s.n == 0)
      if (const cudaError_t error = launch_mask(s, first, end - first, s.counts[first / s.block],
                                                damage, stream_of(target)))
        return error;
    for (int64_t at = first; at < end; at += longest) {
      const auto depth = static_cast<int>(end - at < longest ? end - at : longest);
      if (const cudaError_t error = launch_strip(s, {at, depth}, errors, stream_of(target)))
        return error;
    }
  }
  return cudaSuccess;
}

}  // namespace pysparse::cuda
