// Runs the attention and stripe kernels on host threads.
#include "attention.cuh"
#include "stripes_host.cuh"

namespace pysparse::cuda {
alignas(16) char shared[1 << 18];  // a thread block's dynamic shared memory
namespace {
alignas(16) char shared[1 << 18];  // and that of stripes.cu

template <class T, int kDim, KeySet kSet>
void run(const AttentionProblem& p, const KeyChoice& keys) {
  std::memset(pysparse::cuda::shared, 0xff, sizeof(shared));  // what was not staged is NaN
  const int tiles = static_cast<int>(ceil_div(p.queries + tile_queries(kDim) - 1, tile_queries(kDim)));
  for (blockIdx.z = 0; blockIdx.z < p.batch; ++blockIdx.z)
    shim::launch(tiles, p.heads, kAttentionThreads, [&] { attention_kernel<T, kDim, kSet>(p, keys); });
}
template <class T, int kDim>
void run_set(const AttentionProblem& p, const KeyChoice& keys) {
  if (keys.set == KeySet::kSpans) run<T, kDim, KeySet::kSpans>(p, keys);
  else if (keys.set == KeySet::kStripes) run<T, kDim, KeySet::kStripes>(p, keys);
  else run<T, kDim, KeySet::kBlocks>(p, keys);
}
template <class T>
void run_dim(const AttentionProblem& p, const KeyChoice& keys) {
  if (p.dim == 64) run_set<T, 64>(p, keys);
  else if (p.dim == 128) run_set<T, 128>(p, keys);
  else run_set<T, 256>(p, keys);
}
template <class T>
void search(const StripeSearch& s) {
  const int chunks = static_cast<int>(ceil_div(s.keys, kSearchKeys * kSearchTiles));
  const int heads = s.heads * static_cast<int>(ceil_div(s.groups, kSearchWarps));
  for (blockIdx.z = 0; blockIdx.z < s.batch; ++blockIdx.z)
    shim::launch(chunks, heads, kSearchThreads, [&] {
      if (s.dim == 64) find_stripes_kernel<T, 64>(s);
      else find_stripes_kernel<T, 128>(s);
    });
}
}  // namespace
}  // namespace pysparse::cuda

using namespace pysparse::cuda;

// The structs come as they are: the test builds them with ctypes from the same fields.
extern "C" void run_attention(const AttentionProblem* p, const KeyChoice* keys) {
  if (p->dtype == DType::kBFloat16) run_dim<__nv_bfloat16>(*p, *keys);
  else run_dim<__half>(*p, *keys);
}
extern "C" void run_search(const StripeSearch* s) {
  if (s->dtype == DType::kBFloat16) search<__nv_bfloat16>(*s);
  else search<__half>(*s);
}
extern "C" void run_lists(const uint32_t* bits, int64_t rows, int words, int64_t* counts, int64_t* offsets, int32_t* indices) {
  const int blocks = static_cast<int>(ceil_div(rows, kListWarps));
  shim::launch(blocks, 1, kListWarps * kLanes, [&] { count_stripes_kernel(bits, rows, words, counts); });
  offsets[0] = 0;
  for (int64_t row = 0; row < rows; ++row) offsets[row + 1] = offsets[row] + counts[row];
  shim::launch(blocks, 1, kListWarps * kLanes, [&] { list_stripes_kernel(bits, rows, words, offsets, indices); });
}
extern "C" int struct_bytes(int which) {
  return static_cast<int>(which == 0 ? sizeof(AttentionProblem) : which == 1 ? sizeof(KeyChoice) : sizeof(StripeSearch));
}
