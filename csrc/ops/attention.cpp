// Attention over all keys, and over listed blocks of keys.
#include "pysparse/attention.h"

#include "attention_tiles.h"

namespace pysparse {
namespace {

// Tiles that take a panel in turn while it is in the cache: more of them read keys and values less
// often, fewer leave more of the second-level cache to their states.
constexpr int64_t kTilesAtOnce = 4;

struct DenseTask {
  int64_t batch, key_head, first_head, heads, first_row, rows;
};

// Some heads of one key head x some rows. Late rows, which see the most keys, come first, so that
// the last tasks are small; heads that share keys come together.
std::vector<DenseTask> dense_tasks(const AttentionProblem& p,
                                   const std::vector<Sequence>& sequences, int64_t width) {
  const int64_t ratio = p.heads / p.key_heads, heads = std::min(ratio, kTilesAtOnce);
  const int64_t rows = std::max<int64_t>(1, kTilesAtOnce / heads) * width;
  std::vector<DenseTask> tasks;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& one = sequences[static_cast<size_t>(b)];
    const int64_t blocks = ceil_div(one.end_row - one.first_row, rows);
    for (int64_t kv = 0; kv < p.key_heads; ++kv)
      for (int64_t block = blocks - 1; block >= 0; --block)
        for (int64_t h = 0; h < ratio; h += heads) {
          const int64_t first = one.first_row + block * rows;
          tasks.push_back({b, kv, kv * ratio + h, std::min(heads, ratio - h), first,
                           std::min(rows, one.end_row - first)});
        }
  }
  return tasks;
}

}  // namespace

void flash_attention(const AttentionProblem& problem, const AttentionResult& result) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  const TileShape shape(problem);
  clear_other_rows(problem, sequences, result);
  const PackedKeys packed(problem, sequences, shape, true);
  const int64_t width = shape.kernel.width;
  const std::vector<DenseTask> tasks = dense_tasks(problem, sequences, width);
  take_in_turns(static_cast<int64_t>(tasks.size()), attention_threads(problem), [&] {
    return [&, tiles = Tiles(problem, shape)](int64_t i) mutable {
      const DenseTask& task = tasks[static_cast<size_t>(i)];
      const Sequence& one = sequences[static_cast<size_t>(task.batch)];
      const int64_t columns = ceil_div(task.rows, width), count = columns * task.heads;
      tiles.reserve(count);
      for (int64_t t = 0; t < count; ++t) {
        const int64_t first = task.first_row + t % columns * width;
        tiles.begin(t, one, task.batch, task.first_head + t / columns, first,
                    std::min(width, task.first_row + task.rows - first));
      }
      tiles.sweep(0, count, packed, task.key_head, 0, one.length);
      for (int64_t t = 0; t < count; ++t) tiles.finish(t, result);
    };
  });
}

void block_sparse_attention(const AttentionProblem& problem, const AttentionLists& blocks,
                            int64_t block_k, const AttentionResult& result) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  check(block_k >= kListUnit && block_k % kListUnit == 0, "block_k ", block_k,
        " is not a positive multiple of ", kListUnit);
  check_lists(problem, blocks, ceil_div(problem.keys, block_k), "block");
  const TileShape shape(problem);
  clear_other_rows(problem, sequences, result);
  const PackedKeys packed(problem, sequences, shape, true);
  const int64_t groups =
      problem.batch ? (blocks.offset_count - 1) / (problem.batch * blocks.heads) : 0;
  const int64_t ratio = problem.heads / problem.key_heads, share = problem.heads / blocks.heads;
  struct Task {
    int64_t batch, head, block, items;
  };
  std::vector<Task> tasks;
  const auto list_of = [&](int64_t b, int64_t h, int64_t m) {
    return blocks.offsets + (b * blocks.heads + h / share) * groups + m;
  };
  for (int64_t b = 0; b < problem.batch; ++b)
    for (int64_t h = 0; h < problem.heads; ++h)
      for (int64_t m = 0; m < groups; ++m) {
        const int64_t* list = list_of(b, h, m);
        tasks.push_back({b, h, m, list[1] - list[0]});
      }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.items > b.items; });
  const int64_t width = shape.kernel.width;
  take_in_turns(static_cast<int64_t>(tasks.size()), attention_threads(problem), [&] {
    return [&, tiles = Tiles(problem, shape)](int64_t i) mutable {
      const Task& task = tasks[static_cast<size_t>(i)];
      const Sequence& one = sequences[static_cast<size_t>(task.batch)];
      const int64_t begin = std::max(one.first_row, task.block * blocks.group_size - one.shift);
      const int64_t end = std::min(one.end_row, (task.block + 1) * blocks.group_size - one.shift);
      const int64_t count = ceil_div(std::max<int64_t>(0, end - begin), width);
      tiles.reserve(count);
      for (int64_t t = 0; t < count; ++t)
        tiles.begin(t, one, task.batch, task.head, begin + t * width,
                    std::min(width, end - begin - t * width));
      const int64_t* list = list_of(task.batch, task.head, task.block);
      for (int64_t first = 0; first < count; first += kTilesAtOnce)
        for (int64_t j = list[0]; j < list[1]; ++j) {
          const int64_t key = blocks.items[j] * block_k;
          tiles.sweep(first, std::min(kTilesAtOnce, count - first), packed, task.head / ratio, key,
                      std::min(key + block_k, one.length));
        }
      for (int64_t t = 0; t < count; ++t) tiles.finish(t, result);
    };
  });
}

}  // namespace pysparse
