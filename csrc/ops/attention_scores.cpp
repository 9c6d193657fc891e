// What ProxyAttn looks at: block scores of mean heads on a strided grid, and the mass that the last
// rows put on each block. One pass: per panel the largest dot product and the sum of the weights
// below it, so no row of scores is ever stored.
#include "attention_tiles.h"

namespace pysparse {
namespace {

// Rows of one head, side by side in tiles, weighed against panels that end with their block of
// keys.
class Weigher {
 public:
  Weigher(const AttentionProblem& problem, const TileShape& shape, int64_t block)
      : p_(problem), shape_(shape), block_(block), tiles_(problem, shape) {}

  // Weighs `rows` <= the width of a tile; keys up to the last of them.
  void weigh(const Sequence& sequence, int64_t b, int64_t head, int64_t first_row, int64_t rows,
             const PackedKeys& packed) {
    tiles_.reserve(1);
    tiles_.begin(0, sequence, b, head, first_row, rows);
    const int64_t key_head = head / (p_.heads / p_.key_heads), width = shape_.kernel.width;
    const int64_t end = std::min(sequence.length, tiles_.position(0) + rows);
    blocks_ = ceil_div(end, block_);
    shares_.assign(static_cast<size_t>(blocks_ * width), 0.0f);
    peaks_.assign(shares_.size(), -INFINITY);
    sums_.assign(shares_.size(), 0.0f);
    for (int64_t n = 0; n < blocks_; ++n)
      for (int64_t key = n * block_; key < std::min(end, (n + 1) * block_); key += kPanelKeys) {
        const int64_t last = std::min({end, (n + 1) * block_, key + kPanelKeys});
        const AttentionPanel panel{
            tiles_.words(0),
            packed.keys(b, key_head, key),
            nullptr,
            static_cast<int>(last - key),
            shape_.padded,
            static_cast<int>(std::min<int64_t>(tiles_.position(0) - key, kPanelKeys)),
            p_.scale * kLog2E};
        alignas(64) float panel_maximum[kWidest], panel_sum[kWidest];
        shape_.kernel.weigh_panel(panel, panel_maximum, panel_sum, tiles_.scratch());
        for (int64_t lane = 0; lane < rows; ++lane)
          add(static_cast<size_t>(n * width + lane), panel_maximum[lane], panel_sum[lane]);
      }
    normalise(rows);
  }

  int64_t blocks() const { return blocks_; }
  // Probability that a lane's row gives to block n, and the largest that it gives to a key of it.
  float mass(int64_t n, int64_t lane) const { return sums_[index(n, lane)]; }
  float largest(int64_t n, int64_t lane) const { return shares_[index(n, lane)]; }

 private:
  static constexpr int kWidest = 64;
  size_t index(int64_t n, int64_t lane) const {
    return static_cast<size_t>(n * shape_.kernel.width + lane);
  }
  float power(float difference) const { return std::exp2(difference * p_.scale * kLog2E); }

  void add(size_t place, float maximum, float sum) {
    if (sum == 0) return;  // sees none of the panel
    const float peak = std::max(peaks_[place], maximum);
    if (peaks_[place] > -INFINITY) sums_[place] *= power(peaks_[place] - peak);
    sums_[place] += sum * (maximum > -INFINITY ? power(maximum - peak) : 1.0f);
    peaks_[place] = peak;
  }

  void normalise(int64_t rows) {
    for (int64_t lane = 0; lane < rows; ++lane) {
      float peak = -INFINITY, total = 0;
      for (int64_t n = 0; n < blocks_; ++n) peak = std::max(peak, peaks_[index(n, lane)]);
      for (int64_t n = 0; n < blocks_; ++n) {
        const size_t place = index(n, lane);
        if (sums_[place] == 0) continue;
        shares_[place] = power(peaks_[place] - peak);
        sums_[place] *= shares_[place];
        total += sums_[place];
      }
      for (int64_t n = 0; n < blocks_; ++n) {
        shares_[index(n, lane)] /= total;
        sums_[index(n, lane)] /= total;
      }
    }
  }

  const AttentionProblem& p_;
  const TileShape& shape_;
  const int64_t block_;
  Tiles tiles_;
  int64_t blocks_ = 0;
  std::vector<float> peaks_, sums_, shares_;
};

// The mean of `count` neighbouring heads at every `stride`-th row, [rows][dim], rounded to T.
template <class T>
void mean_heads(const AttentionTensor& tensor, int64_t batch, int64_t first_head, int64_t count,
                int64_t first_row, int64_t rows, int64_t stride, int64_t dim, T* mean) {
  std::vector<float> sums(static_cast<size_t>(dim));
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int64_t h = first_head; h < first_head + count; ++h) {
      const T* row = at<const T>(tensor, sizeof(T), batch, h, first_row + i * stride);
      for (int64_t d = 0; d < dim; ++d) sums[static_cast<size_t>(d)] += to_float(row[d]);
    }
    for (int64_t d = 0; d < dim; ++d)
      assign(mean[i * dim + d], sums[static_cast<size_t>(d)] / static_cast<float>(count));
  }
}

void mean_heads(const AttentionProblem& p, const AttentionTensor& tensor, int64_t batch,
                int64_t first_head, int64_t count, int64_t first_row, int64_t rows, int64_t stride,
                char* mean) {
  if (p.dtype == DType::kFloat32)
    mean_heads(tensor, batch, first_head, count, first_row, rows, stride, p.dim,
               reinterpret_cast<float*>(mean));
  else
    mean_heads(tensor, batch, first_head, count, first_row, rows, stride, p.dim,
               reinterpret_cast<BFloat16*>(mean));
}

// One sequence's strided grid as an attention problem of its own: proxies for heads, positions in
// strides.
void score_sequence(const AttentionProblem& p, const ProxyGrid& grid, int64_t b,
                    const Sequence& one, float* scores) {
  const int64_t q_blocks = ceil_div(p.q_offset + p.rows, grid.block);
  const int64_t key_blocks = ceil_div(p.keys, grid.block);
  const int64_t offset = ceil_div(one.first_row + one.shift, grid.stride);
  const int64_t first = offset * grid.stride - one.shift;
  const int64_t rows = std::max<int64_t>(0, ceil_div(one.end_row - first, grid.stride));
  const int64_t keys = ceil_div(one.length, grid.stride);
  if (rows == 0) return;
  const int64_t row_bytes = p.dim * size_of(p.dtype);
  const int64_t key_proxies = std::min(grid.proxies, p.key_heads);
  AlignedArray<char> q(grid.proxies * rows * row_bytes), k(key_proxies * keys * row_bytes);
  parallel_for(grid.proxies, p.heads * (rows + keys) * row_bytes, [&](int64_t proxy) {
    const int64_t heads = p.heads / grid.proxies, key_heads = p.key_heads / key_proxies;
    mean_heads(p, p.q, b, proxy * heads, heads, first, rows, grid.stride,
               q.data() + proxy * rows * row_bytes);
    if (proxy < key_proxies)
      mean_heads(p, p.k, b, proxy * key_heads, key_heads, one.start, keys, grid.stride,
                 k.data() + proxy * keys * row_bytes);
  });
  AttentionProblem means = p;
  means.q = {q.data(), 0, rows * p.dim, p.dim};
  means.k = means.v = {k.data(), 0, keys * p.dim, p.dim};
  means.batch = 1, means.heads = grid.proxies, means.key_heads = key_proxies;
  means.rows = rows, means.keys = keys, means.q_offset = offset, means.key_range = nullptr;
  const std::vector<Sequence> sequences = sequences_of(means);
  const TileShape shape(means);
  const PackedKeys packed(means, sequences, shape, false);
  // A task owns whole blocks of rows, as many as a tile holds.
  const int64_t in_block = grid.block / grid.stride, width = shape.kernel.width;
  const int64_t per_task = std::max<int64_t>(1, width / in_block) * in_block;
  const int64_t first_task = offset / per_task,
                tasks = (offset + rows - 1) / per_task + 1 - first_task;
  take_in_turns(grid.proxies * tasks, attention_threads(means), [&] {
    return [&, weigher = Weigher(means, shape, in_block)](int64_t i) mutable {
      const int64_t proxy = i / tasks, task = first_task + tasks - 1 - i % tasks;
      const int64_t end = std::min(rows, (task + 1) * per_task - offset);
      for (int64_t r = std::max<int64_t>(0, task * per_task - offset); r < end; r += width) {
        const int64_t count = std::min(width, end - r);
        weigher.weigh(sequences[0], 0, proxy, r, count, packed);
        for (int64_t lane = 0; lane < count; ++lane) {
          float* row = scores + (proxy * q_blocks + (offset + r + lane) / in_block) * key_blocks;
          for (int64_t n = 0; n < weigher.blocks(); ++n)
            row[n] = std::max(row[n], weigher.largest(n, lane));
        }
      }
    };
  });
}

}  // namespace

void proxy_scores(const AttentionProblem& problem, const ProxyGrid& grid, float* scores) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  check(grid.block >= kListUnit && grid.block % kListUnit == 0, "block ", grid.block,
        " is not a positive multiple of ", kListUnit);
  check(grid.stride >= 1 && grid.block % grid.stride == 0, "stride ", grid.stride,
        " does not divide a block of ", grid.block);
  check(grid.proxies >= 1 && problem.heads % grid.proxies == 0 &&
            (problem.key_heads == 1 || problem.key_heads % grid.proxies == 0),
        grid.proxies, " proxies do not divide ", problem.heads, " query and ", problem.key_heads,
        " key heads");
  const int64_t blocks =
      ceil_div(problem.q_offset + problem.rows, grid.block) * ceil_div(problem.keys, grid.block);
  std::fill_n(scores, problem.batch * grid.proxies * blocks, 0.0f);
  for (int64_t b = 0; b < problem.batch; ++b)
    score_sequence(problem, grid, b, sequences[static_cast<size_t>(b)],
                   scores + b * grid.proxies * blocks);
}

void block_mass(const AttentionProblem& problem, int64_t block, float* mass) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  check(block >= kListUnit && block % kListUnit == 0, "block ", block,
        " is not a positive multiple of ", kListUnit);
  const int64_t key_blocks = ceil_div(problem.keys, block);
  std::fill_n(mass, problem.batch * problem.heads * key_blocks, 0.0f);
  const TileShape shape(problem);
  const PackedKeys packed(problem, sequences, shape, false);
  take_in_turns(problem.batch * problem.heads, attention_threads(problem), [&] {
    return [&, weigher = Weigher(problem, shape, block)](int64_t i) mutable {
      const int64_t b = i / problem.heads, head = i % problem.heads;
      const Sequence& one = sequences[static_cast<size_t>(b)];
      if (one.first_row >= one.end_row) return;
      const int64_t last = (one.end_row - 1 + one.shift) / block * block;
      const int64_t first = std::max(one.first_row, last - one.shift);
      const int64_t width = shape.kernel.width;
      for (int64_t r = first; r < one.end_row; r += width) {
        const int64_t count = std::min(width, one.end_row - r);
        weigher.weigh(one, b, head, r, count, packed);
        for (int64_t n = 0; n < weigher.blocks(); ++n)
          for (int64_t lane = 0; lane < count; ++lane)
            mass[i * key_blocks + n] +=
                weigher.mass(n, lane) / static_cast<float>(one.end_row - first);
      }
    };
  });
}

}  // namespace pysparse
