// Runs the n:m kernels on host threads.
#include "nm_host.cuh"

#include <type_traits>

namespace pysparse::cuda {
namespace {
uint4 shared[1 << 14];  // a thread block's dynamic shared memory

template <class T, int kTokens, int kBits>
void run(const NmWeight& w, const Product& p, int grid, int threads, int team) {
  std::memset(shared, 0xff, sizeof(shared));  // what was not staged is NaN
  const NmRows shape = nm_rows(w.n, w.bits, p.cols);
  shim::launch(grid, 1, threads, [&] { nm_linear_kernel<T, kTokens, kBits>(w, p, shape, team); });
}
template <class T, int kTokens>
void run_bits(const NmWeight& w, const Product& p, int grid, int threads, int team) {
  if (w.bits == 2) run<T, kTokens, 2>(w, p, grid, threads, team);
  else if (w.bits == 3) run<T, kTokens, 3>(w, p, grid, threads, team);
  else run<T, kTokens, 4>(w, p, grid, threads, team);
}
template <class T>
void run_tokens(const NmWeight& w, const Product& p, int grid, int threads, int team) {
  if (p.tokens <= 1) run_bits<T, 1>(w, p, grid, threads, team);
  else if (p.tokens <= 2) run_bits<T, 2>(w, p, grid, threads, team);
  else if (p.tokens <= 4) run_bits<T, 4>(w, p, grid, threads, team);
  else run_bits<T, 8>(w, p, grid, threads, team);
}
}  // namespace
}  // namespace pysparse::cuda

using namespace pysparse::cuda;

// Warps that may share a row of such a weight.
extern "C" int nm_team(int n, int bits, int cols) { return most_team(nm_rows(n, bits, cols)); }

// Threads, grid, team and shared bytes of a launch; returns the error.
extern "C" int plan_nm(const int* card, int n, int bits, int tokens, int rows, int cols, int* out) {
  const Device device{card[0], card[1], card[2], card[3], 9};
  const Product p{nullptr, nullptr, nullptr, tokens, rows, cols, DType::kBFloat16};
  const NmRows shape = nm_rows(n, bits, cols);
  RowPlan plan{};
  const auto make = [&](auto width) {
    return plan_rows<decltype(width)::value>(p, device, shape.columns(), most_team(shape), plan);
  };
  const int error = tokens <= 1   ? make(std::integral_constant<int, 1>())
                    : tokens <= 2 ? make(std::integral_constant<int, 2>())
                    : tokens <= 4 ? make(std::integral_constant<int, 4>())
                                  : make(std::integral_constant<int, 8>());
  out[0] = plan.threads, out[1] = plan.grid, out[2] = plan.team, out[3] = plan.shared;
  return error;
}

extern "C" void run_nm(int grid, int threads, int team, int dtype, const void* values, const uint8_t* places, int n,
                       int bits, const void* x, const void* bias, void* y, int tokens, int rows, int cols) {
  const NmWeight w{values, places, n, bits};
  const Product p{x, bias, y, tokens, rows, cols, static_cast<DType>(dtype)};
  if (dtype == 0) run_tokens<__nv_bfloat16>(w, p, grid, threads, team);
  else run_tokens<__half>(w, p, grid, threads, team);
}

extern "C" void unpack_nm(const void* values, const uint8_t* places, int n, int bits, void* dense, int first_row,
                          int part_rows, int rows, int cols) {
  const NmWeight w{values, places, n, bits};
  const Rows r{dense, first_row, part_rows, rows, cols};
  const NmRows shape = nm_rows(n, bits, cols);
  const auto start = [&](auto kernel) {
    shim::launch(part_rows, 1, kUnpackThreads, [&] { kernel(w, r, shape); });
  };
  if (bits == 2) start(nm_unpack_kernel<2>);
  else if (bits == 3) start(nm_unpack_kernel<3>);
  else start(nm_unpack_kernel<4>);
}
