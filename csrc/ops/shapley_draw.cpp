// Draws a row for each sample: check the counters, choose a kernel, split the rows.
#include "pysparse/shapley_draw.h"

#include <algorithm>
#include <utility>

#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {
namespace {

void check_view(const DrawView& view) {
  check(view.rows >= 0 && view.cols >= 0, "negative shape ", view.rows, " x ", view.cols);
  check(view.cols <= kMaxPlayers, view.cols, " players are more than ", kMaxPlayers);
  check(view.first <= Stream::kSamples &&
            static_cast<uint64_t>(view.rows) <= Stream::kSamples - view.first,
        "samples ", view.first, " to ", view.first, " + ", view.rows, " are beyond ",
        Stream::kSamples);
  check(view.visit < Stream::kVisits, "visit ", view.visit, " is beyond ", Stream::kVisits);
}

// Calls body(stream, row, words) for each row, with room for a row of words.
template <class Body>
void for_each_row(const DrawView& view, const Body& body) {
  check_view(view);
  parallel(threads_for(view.rows * view.cols * 8), [&](int thread, int threads) {
    thread_local Scratch scratch;
    auto* words = static_cast<uint32_t*>(
        scratch.reserve(static_cast<size_t>(ShapleyDraw::padded(view.cols)) * sizeof(uint32_t)));
    const Range rows = even_share(view.rows, thread, threads);
    for (int64_t r = rows.begin; r < rows.end; ++r)
      body(Stream{view.seed, view.first + static_cast<uint64_t>(r), view.visit, view.purpose}, r,
           words);
  });
}

}  // namespace

void draw_words(const DrawView& view, uint32_t* words) {
  const auto& kernel = lookup<ShapleyDraw>(DType::kFloat32);
  for_each_row(view, [&](const Stream& stream, int64_t row, uint32_t* drawn) {
    kernel.words(stream, view.cols, drawn);
    std::copy(drawn, drawn + view.cols, words + row * view.cols);
  });
}

void draw_permutations(const DrawView& view, int32_t* orders) {
  const auto& kernel = lookup<ShapleyDraw>(DType::kFloat32);
  for_each_row(view, [&](const Stream& stream, int64_t row, uint32_t* partner) {
    kernel.partners(stream, view.cols, partner);
    int32_t* order = orders + row * view.cols;
    for (int64_t i = 0; i < view.cols; ++i) order[i] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < view.cols; ++i) std::swap(order[i], order[partner[i]]);
  });
}

}  // namespace pysparse
