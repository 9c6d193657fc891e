// Runs the delta kernels on host threads.
#include "delta_host.cuh"

namespace pysparse::cuda {
namespace {
uint4 shared[1 << 14];  // a thread block's dynamic shared memory

template <class T, int kTokens>
void run(const DeltaWeight& w, const Product& p, int grid, int threads, int team) {
  std::memset(shared, 0xff, sizeof(shared));  // what was not staged is NaN
  shim::launch(grid, 1, threads, [&] { delta_linear_kernel<T, kTokens>(w, p, team); });
}
template <class T>
void run_tokens(const DeltaWeight& w, const Product& p, int grid, int threads, int team) {
  if (p.tokens <= 1) run<T, 1>(w, p, grid, threads, team);
  else if (p.tokens <= 2) run<T, 2>(w, p, grid, threads, team);
  else if (p.tokens <= 4) run<T, 4>(w, p, grid, threads, team);
  else run<T, 8>(w, p, grid, threads, team);
}
}  // namespace
}  // namespace pysparse::cuda

using namespace pysparse::cuda;

extern "C" void run_delta(int grid, int threads, int team, int dtype, const void* values, const uint32_t* deltas,
                          const int32_t* row_groups, const int32_t* chunk_cols, const void* x, const void* bias, void* y,
                          int tokens, int rows, int cols) {
  const DeltaWeight w{values, deltas, row_groups, chunk_cols};
  const Product p{x, bias, y, tokens, rows, cols, static_cast<DType>(dtype)};
  if (dtype == 0) run_tokens<__nv_bfloat16>(w, p, grid, threads, team);
  else run_tokens<__half>(w, p, grid, threads, team);
}

extern "C" void unpack_delta(const void* values, const uint32_t* deltas, const int32_t* row_groups,
                             const int32_t* chunk_cols, void* dense, int first_row, int part_rows, int rows, int cols) {
  const DeltaWeight w{values, deltas, row_groups, chunk_cols};
  const Rows r{dense, first_row, part_rows, rows, cols};
  shim::launch(part_rows, 1, kUnpackThreads, [&] { delta_unpack_kernel(w, r); });
}
