// Host side of the embedding kernels: check, grid, launch.
#include "embedding.cuh"

namespace pysparse::cuda {
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff;

template <int kGroup>
int64_t blocks_for(int64_t rows) {
  return ceil_div(rows, kEmbeddingThreads / kGroup);
}

bool sound(const EmbeddingTable& t, const EmbeddingIds& ids) {
  return t.dims > 0 && t.fields > 0 && ids.count >= 0 &&
         (ids.columns == 0 || ids.columns == t.fields);
}

template <class T, int kGroup>
cudaError_t launch_lookup(const EmbeddingTable& t, const EmbeddingIds& ids, T missing, void* out,
                          cudaStream_t stream) {
  const int64_t blocks = blocks_for<kGroup>(ids.count);
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  embedding_lookup_kernel<T, kGroup>
      <<<static_cast<unsigned>(blocks), kEmbeddingThreads, 0, stream>>>(t, ids, missing,
                                                                        static_cast<T*>(out));
  return cudaGetLastError();
}

template <class T>
cudaError_t lookup(const EmbeddingTable& t, const EmbeddingIds& ids, T missing, void* out,
                   cudaStream_t stream) {
  if (t.dims <= 8) return launch_lookup<T, 8>(t, ids, missing, out, stream);
  if (t.dims <= 16) return launch_lookup<T, 16>(t, ids, missing, out, stream);
  return launch_lookup<T, 32>(t, ids, missing, out, stream);
}

template <class T, int kGroup>
cudaError_t launch_bag(const EmbeddingTable& t, const EmbeddingIds& ids, const EmbeddingBags& bags,
                       void* out, cudaStream_t stream) {
  const int64_t blocks = blocks_for<kGroup>(bags.count), parts = ceil_div(t.dims, kGroup);
  if (blocks > kMostBlocks || parts > 65535) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(parts));
  embedding_bag_kernel<T, kGroup>
      <<<grid, kEmbeddingThreads, 0, stream>>>(t, ids, bags, static_cast<T*>(out));
  return cudaGetLastError();
}

template <class T>
cudaError_t bag(const EmbeddingTable& t, const EmbeddingIds& ids, const EmbeddingBags& bags,
                void* out, cudaStream_t stream) {
  if (t.dims <= 8) return launch_bag<T, 8>(t, ids, bags, out, stream);
  if (t.dims <= 16) return launch_bag<T, 16>(t, ids, bags, out, stream);
  return launch_bag<T, 32>(t, ids, bags, out, stream);
}

}  // namespace

int embedding_check(const EmbeddingTable& table, const EmbeddingIds& ids, const EmbeddingBags* bags,
                    uint64_t* faults, const Target& target) {
  if (!sound(table, ids)) return cudaErrorInvalidValue;
  const EmbeddingBags some = bags ? *bags : EmbeddingBags{};
  const int64_t blocks =
      ceil_div(ids.count > some.count ? ids.count : some.count, kEmbeddingThreads);
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMostBlocks) return cudaErrorInvalidValue;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  embedding_check_kernel<<<static_cast<unsigned>(blocks), kEmbeddingThreads, 0,
                           stream_of(target)>>>(table, ids, some, faults);
  return cudaGetLastError();
}

int embedding_lookup(const EmbeddingTable& table, const EmbeddingIds& ids, void* out,
                     const Target& target) {
  if (!sound(table, ids)) return cudaErrorInvalidValue;
  if (ids.count == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  constexpr uint32_t kWord = 0x7fffffffu;
  constexpr unsigned short kHalfWord = 0x7fff;
  return table.entry == Entry::kFloat32
             ? lookup<uint32_t>(table, ids, kWord, out, stream_of(target))
             : lookup<unsigned short>(table, ids, kHalfWord, out, stream_of(target));
}

int embedding_bag(const EmbeddingTable& table, const EmbeddingIds& ids, const EmbeddingBags& bags,
                  void* out, const Target& target) {
  if (!sound(table, ids)) return cudaErrorInvalidValue;
  if (bags.count == 0) return cudaSuccess;
  const DeviceGuard guard(target.device);
  if (guard.error()) return guard.error();
  switch (table.entry) {
    case Entry::kFloat32:
      return bag<float>(table, ids, bags, out, stream_of(target));
    case Entry::kBFloat16:
      return bag<__nv_bfloat16>(table, ids, bags, out, stream_of(target));
    case Entry::kFloat16:
      return bag<__half>(table, ids, bags, out, stream_of(target));
  }
  return cudaErrorInvalidValue;
}

}  // namespace pysparse::cuda
