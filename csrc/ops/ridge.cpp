// Pads the Hessian and splits the rows over threads, a group of problems at a time.
#include "pysparse/ridge.h"

#include <vector>

#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {

void ridge_rows(const RidgeView& view) {
  check(view.size >= 1 && view.size <= kRidgeMax, "ridge problems have 1 to ", kRidgeMax,
        " unknowns, got ", view.size);
  check(view.rows >= 0, "ridge problems: ", view.rows, " rows");
  RidgeView known = view;
  known.padded = (view.size + kRidgeTile - 1) / kRidgeTile * kRidgeTile;
  const auto size = static_cast<size_t>(view.size), padded = static_cast<size_t>(known.padded);
  std::vector<float> gram(padded * padded, 0.0f);
  for (size_t i = 0; i < size; ++i)
    std::copy_n(view.gram + i * size, size, gram.data() + i * padded);
  known.gram = gram.data();
  const auto& kernel = lookup<RidgeRows>(DType::kFloat32);
  const int64_t groups = (view.rows + kRidgeGroup - 1) / kRidgeGroup;
  const int64_t bytes = view.rows * view.size * view.size * 4;
  parallel(threads_for(bytes), [&](int thread, int threads) {
    thread_local Scratch scratch;
    void* room = scratch.reserve(kernel.scratch_bytes(known.padded));
    const Range share = even_share(groups, thread, threads);
    for (int64_t g = share.begin; g < share.end; ++g)
      kernel.run(known, g * kRidgeGroup, std::min(view.rows, (g + 1) * kRidgeGroup), room);
  });
}

}  // namespace pysparse
