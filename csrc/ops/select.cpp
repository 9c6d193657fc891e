// Selection of what to prune: check, choose a kernel, split the rows.
#include "pysparse/select.h"

#include <atomic>

#include "pysparse/nm.h"
#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {
namespace {

void check_view(const ScoredView& view) {
  check(view.rows >= 0 && view.cols >= 0, "negative shape ", view.rows, " x ", view.cols);
  if (!view.scale) return;
  for (int64_t c = 0; c < view.cols; ++c)
    check(!(view.scale[c] < 0), "scale ", view.scale[c], " of column ", c, " is negative");
}

// Calls run(begin, end), which returns a count of NaN scores, on shares of the rows.
template <class Run>
void split_rows(const ScoredView& view, const Run& run) {
  std::atomic<int64_t> damaged{0};
  parallel(threads_for(view.rows * view.cols * size_of(view.dtype)), [&](int thread, int threads) {
    const Range rows = even_share(view.rows, thread, threads);
    damaged += run(rows.begin, rows.end);
  });
  check(damaged == 0, damaged.load(), " of ", view.rows * view.cols,
        " scores are NaN: is the weight damaged?");
}

}  // namespace

void select_rows(const ScoredView& view, int64_t count, const Selection& out) {
  check_view(view);
  check(count >= 0 && count <= view.cols, "cannot prune ", count, " of ", view.cols, " columns");
  const auto& kernel = lookup<RowSelect>(view.dtype);
  split_rows(view, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    auto* keys =
        static_cast<int32_t*>(scratch.reserve(RowSelect::key_count(view.cols) * sizeof(int32_t)));
    return kernel.run(view, count, begin, end, keys, out);
  });
}

void select_nm(const ScoredView& view, int n, int m, const Selection& out) {
  check_view(view);
  check(n > 0 && n < m && m <= kMaxGroup, "an n:m pattern keeps 0 < n < m <= ", kMaxGroup,
        " weights, got ", n, ":", m);
  const auto& best = lookup<NmSelect>(view.dtype);
  const auto& kernel = best.covers(m) ? best : nm_select_generic(view.dtype);
  split_rows(view,
             [&](int64_t begin, int64_t end) { return kernel.run(view, n, m, begin, end, out); });
}

}  // namespace pysparse
