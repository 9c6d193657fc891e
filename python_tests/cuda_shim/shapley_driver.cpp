// Runs the Shapley kernels, host side and all, on host threads.
#include "shapley_host.cuh"

namespace pysparse::cuda {
alignas(16) char walk_room[1 << 18];  // a thread block's dynamic shared memory
}
using namespace pysparse::cuda;

extern "C" int words(const ShapleyDraw* draw, uint32_t* out) { return shapley_words(*draw, out, {0, nullptr}); }
extern "C" int permutations(const ShapleyDraw* draw, uint32_t* room, int32_t* orders) {
  return shapley_permutations(*draw, room, orders, {0, nullptr});
}
extern "C" int marginals(const FmSamples* samples, const FmOrders* orders, float* out, uint32_t* peak) {
  std::memset(walk_room, 0xff, sizeof(walk_room));  // what was not written is NaN
  return fm_marginals(*samples, *orders, out, peak, {0, nullptr});
}
extern "C" int add(const float* marginals, const int32_t* ids, int64_t samples, int fields, int cols,
                   const MarginalSums* totals) {
  return add_marginals(marginals, ids, samples, fields, cols, *totals, {0, nullptr});
}
extern "C" int struct_bytes(int which) {
  const int sizes[] = {sizeof(ShapleyDraw), sizeof(FmSamples), sizeof(FmOrders), sizeof(MarginalSums)};
  return sizes[which];
}
