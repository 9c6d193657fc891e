// The sweep block by block: bring a block up to date, choose its mask, prune it strip by strip.
#include "pysparse/obs.h"

#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "pysparse/nm.h"
#include "pysparse/parallel.h"
#include "pysparse/select.h"

namespace pysparse {
namespace {

constexpr int64_t kRowGroup = 256;  // rows x 128 columns: 128 KB, beside U's strips in the L2 cache

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};
template <class T>
using Room = std::unique_ptr<T[], FreeAligned>;

// Whole cache lines, not written: a vector would touch every page of these large arrays twice, and
// a register that straddles two lines loads at half speed.
template <class T>
Room<T> room_for(int64_t count) {
  const auto bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
  return Room<T>(static_cast<T*>(::operator new(bytes, std::align_val_t{64})));
}

class Sweep {
 public:
  explicit Sweep(const ObsProblem& problem)
      : p_(problem),
        kernel_(lookup<ObsSweep>(DType::kFloat32)),
        depth_(p_.group == ObsGroup::kNm ? strip_depth(p_.m) : kObsDepth),
        panel_cols_(round_up(std::min(p_.block, p_.cols), kObsWidth)),
        panel_(room_for<float>(p_.rows * panel_cols_)),
        tiles_(room_for<float>(p_.cols * panel_cols_)) {}

  void run() {
    for (int64_t b = 0; b < p_.blocks; ++b) {
      first_ = b * p_.block;
      width_ = std::min(p_.block, p_.cols - first_);
      pack_upper();
      const int64_t known = static_cast<int64_t>(strips_.size());
      bring_up_to_date(known);
      if (p_.group != ObsGroup::kNm) choose_mask(p_.counts[b]);
      for (int64_t done = 0; done < width_; done += depth_) add_strip(done);
      prune_block(known);
    }
  }

 private:
  struct Strip {
    int64_t first;  // column of the matrix
    int depth, room;
    Room<float> values;
    Room<uint8_t> columns, counts;

    ObsErrors errors() const { return {values.get(), columns.get(), counts.get(), room}; }
  };

  // As many columns as whole groups have room in the cache; a longer group is a strip of its own.
  static int strip_depth(int m) { return m > kObsDepth ? m : kObsDepth / m * m; }

  int64_t tiles() const { return round_up(width_, kObsWidth) / kObsWidth; }
  // U of one strip's rows and one tile of the block's columns, [strip.depth][kObsWidth].
  float* tile(int64_t t, int64_t column) const {
    return tiles_.get() + (t * p_.cols + column) * kObsWidth;
  }
  template <class Body>
  void over_rows(const Body& body) const {
    parallel(threads_for(p_.rows * width_ * 64), [&](int thread, int threads) {
      const Range rows = even_share(p_.rows, thread, threads);
      for (int64_t begin = rows.begin; begin < rows.end; begin += kRowGroup)
        body(begin, std::min(rows.end, begin + kRowGroup));
    });
  }

  // Rows [0, first + width) of U, the block's columns, in tiles; zero on and below the strip that a
  // row belongs to, so that a strip updates only what lies right of it.
  void pack_upper() {
    parallel_for((first_ + width_) * tiles(), (first_ + width_) * width_ * 8, [&](int64_t i) {
      const int64_t t = i / (first_ + width_), k = i % (first_ + width_);
      const int64_t begin = first_ + t * kObsWidth;
      const int64_t end = std::min(begin + kObsWidth, first_ + width_);
      const int64_t strip_end = k < first_ ? 0 : first_ + ((k - first_) / depth_ + 1) * depth_;
      const int64_t from = std::min(end, std::max(begin, strip_end));
      float* target = tile(t, k);
      std::fill(target, target + (from - begin), 0.0f);
      std::copy(p_.upper + k * p_.cols + from, p_.upper + k * p_.cols + end,
                target + (from - begin));
      std::fill(target + (end - begin), target + kObsWidth, 0.0f);
    });
  }

  void bring_up_to_date(int64_t known) {
    over_rows([&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const float* source = p_.weight + r * p_.cols + first_;
        float* target = panel_.get() + r * panel_cols_;
        std::copy(source, source + width_, target);
        std::fill(target + width_, target + panel_cols_, 0.0f);
      }
      for (int64_t t = 0; t < tiles(); ++t)
        for (int64_t s = 0; s < known; ++s) update(strips_[static_cast<size_t>(s)], t, begin, end);
    });
  }

  void update(const Strip& strip, int64_t t, int64_t begin, int64_t end) const {
    kernel_.update(panel_.get() + t * kObsWidth, panel_cols_, strip.errors(), tile(t, strip.first),
                   begin, end);
  }

  void choose_mask(int64_t count) {
    if (!scores_) {
      scores_ = room_for<float>(p_.rows * panel_cols_);
      block_keep_ = room_for<uint8_t>(p_.rows * panel_cols_);
    }
    over_rows([&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < width_; ++c)
          scores_[r * width_ + c] = std::abs(panel_[r * panel_cols_ + c]) * p_.scale[first_ + c];
    });
    const bool joint = p_.group == ObsGroup::kMatrix;
    const ScoredView view{scores_.get(), nullptr, joint ? 1 : p_.rows,
                          joint ? p_.rows * width_ : width_, DType::kFloat32};
    select_rows(view, count, {block_keep_.get(), nullptr});
    over_rows([&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        std::copy_n(block_keep_.get() + r * width_, width_, p_.keep + r * p_.cols + first_);
    });
  }

  void add_strip(int64_t done) {
    const int depth = static_cast<int>(std::min<int64_t>(depth_, width_ - done));
    const bool few = p_.group == ObsGroup::kNm && !p_.grid.steps;
    const int room = few ? depth / p_.m * (p_.m - p_.n) : depth;
    strips_.push_back({first_ + done, depth, room, room_for<float>(p_.rows * room),
                       room_for<uint8_t>(p_.rows * room), room_for<uint8_t>(p_.rows)});
  }

  void prune_block(int64_t known) {
    over_rows([&](int64_t begin, int64_t end) {
      for (size_t s = static_cast<size_t>(known); s < strips_.size(); ++s) {
        prune_strip(strips_[s], begin, end);
        for (int64_t t = 0; t < tiles(); ++t)
          if (strips_[s].first + depth_ < first_ + width_) update(strips_[s], t, begin, end);
      }
      for (int64_t r = begin; r < end; ++r)
        std::copy_n(panel_.get() + r * panel_cols_, width_, p_.weight + r * p_.cols + first_);
    });
  }

  void prune_strip(const Strip& strip, int64_t begin, int64_t end) const {
    alignas(64) float upper[kObsDiagonal * kObsDiagonal] = {};
    float inverse[kObsDiagonal] = {};
    for (int j = 0; j < strip.depth; ++j) {
      const float* row = p_.upper + (strip.first + j) * p_.cols + strip.first;
      std::copy(row + j, row + strip.depth, upper + j * kObsDiagonal + j);
      inverse[j] = 1.0f / row[j];
    }
    const ObsStrip view{panel_.get() + strip.first - first_,
                        panel_cols_,
                        strip.depth,
                        upper,
                        inverse,
                        p_.keep + strip.first,
                        p_.cols,
                        p_.scale + strip.first,
                        p_.group == ObsGroup::kNm ? p_.n : 0,
                        p_.m,
                        p_.grid,
                        strip.first};
    kernel_.sweep(view, strip.errors(), begin, end);
  }

  const ObsProblem& p_;
  const ObsSweep::Kernel& kernel_;
  const int depth_;
  const int64_t panel_cols_;
  Room<float> panel_, tiles_, scores_;
  Room<uint8_t> block_keep_;
  std::vector<Strip> strips_;
  int64_t first_ = 0, width_ = 0;  // of the block at hand
};

}  // namespace

void obs_sweep(const ObsProblem& problem) {
  const ObsProblem& p = problem;
  check(p.rows >= 0 && p.cols >= 0, "negative shape ", p.rows, " x ", p.cols);
  check(p.block >= 1, "a block has at least one column, got ", p.block);
  const int64_t blocks = (p.cols + p.block - 1) / p.block;
  if (p.group == ObsGroup::kNm) {
    check(p.n > 0 && p.n < p.m && p.m <= kMaxGroup, "an n:m pattern keeps 0 < n < m <= ", kMaxGroup,
          " weights, got ", p.n, ":", p.m);
    check(p.block % p.m == 0, "blocks of ", p.block, " columns split groups of ", p.m);
  } else {
    check(p.blocks == blocks, "counts for ", p.blocks, " blocks, ", p.cols, " columns have ",
          blocks);
  }
  if (p.grid.steps) {
    check(p.grid.group_cols > 0, "a step covers at least one column, got ", p.grid.group_cols);
    const int64_t groups =
        std::max<int64_t>(1, (p.cols + p.grid.group_cols - 1) / p.grid.group_cols);
    check(p.grid.groups == groups, "steps for ", p.grid.groups, " groups a row, ", p.cols,
          " columns have ", groups);
    for (int64_t i = 0; i < p.rows * groups; ++i)
      check(p.grid.steps[i] >= 0 && std::isfinite(p.grid.steps[i]), "step ", p.grid.steps[i],
            " of row ", i / groups, " is negative or not finite");
  }
  for (int64_t c = 0; c < p.cols; ++c) {
    check(p.upper[c * p.cols + c] > 0, "the factor's diagonal is ", p.upper[c * p.cols + c],
          " at column ", c, ", it must be positive");
    check(p.scale[c] >= 0, "scale ", p.scale[c], " of column ", c, " is negative or NaN");
  }
  ObsProblem known = p;
  known.blocks = blocks;
  if (p.rows > 0) Sweep(known).run();
}

}  // namespace pysparse
