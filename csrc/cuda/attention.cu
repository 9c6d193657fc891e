// Chooses the instance of the attention kernel: dtype, head size, kind of key list.
#include "attention.cuh"

namespace pysparse::cuda {
namespace {

template <class T, int kDim, KeySet kSet>
cudaError_t launch(const AttentionProblem& p, const KeyChoice& keys, cudaStream_t stream) {
  auto* kernel = attention_kernel<T, kDim, kSet>;
  constexpr int kShared = attention_shared(kDim), kQueries = tile_queries(kDim);
  if (const cudaError_t error = allow_shared(kernel, kShared)) return error;
  // A sequence's first key may lie anywhere, so its first tile may hold one query only.
  const int64_t tiles = ceil_div(static_cast<int64_t>(p.queries) + kQueries - 1, kQueries);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(p.heads),
                  static_cast<unsigned>(p.batch));
  kernel<<<grid, kAttentionThreads, kShared, stream>>>(p, keys);
  return cudaGetLastError();
}

template <class T, int kDim>
cudaError_t launch_set(const AttentionProblem& p, const KeyChoice& keys, cudaStream_t stream) {
  switch (keys.set) {
    case KeySet::kSpans:
      return launch<T, kDim, KeySet::kSpans>(p, keys, stream);
    case KeySet::kStripes:
      return launch<T, kDim, KeySet::kStripes>(p, keys, stream);
    case KeySet::kBlocks:
      return launch<T, kDim, KeySet::kBlocks>(p, keys, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_dim(const AttentionProblem& p, const KeyChoice& keys, cudaStream_t stream) {
  switch (p.dim) {
    case 64:
      return launch_set<T, 64>(p, keys, stream);
    case 128:
      return launch_set<T, 128>(p, keys, stream);
    case 256:
      return launch_set<T, 256>(p, keys, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

bool fits(const AttentionProblem& p, const KeyChoice& c) {
  constexpr int kMostBlocks = 65535;  // of a grid's second and third dimension
  if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads || p.heads > kMostBlocks ||
      p.batch > kMostBlocks || p.offset < 0 || !(p.scale > 0.f))
    return false;
  if (c.set == KeySet::kSpans) return c.group == 0 || c.group % 128 == 0;
  if (c.group < 128 || c.group % 128 || c.list_heads < 1 || p.heads % c.list_heads) return false;
  return c.set == KeySet::kStripes || (c.block >= kTileKeys && c.block % kTileKeys == 0);
}

}  // namespace

int attention(const AttentionProblem& p, const KeyChoice& keys, const Target& target) {
  if (p.batch == 0 || p.queries == 0) return cudaSuccess;
  if (!fits(p, keys)) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  return p.dtype == DType::kBFloat16 ? launch_dim<__nv_bfloat16>(p, keys, stream_of(target))
                                     : launch_dim<__half>(p, keys, stream_of(target));
}

}  // namespace pysparse::cuda
