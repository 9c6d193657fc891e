// A decoding step's attention: check, choose a kernel, share the heads out over the threads.
#include "pysparse/row_attention.h"

#include <algorithm>

#include "pysparse/error.h"
#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {
namespace {

void check_problem(const RowProblem& p) {
  check(p.batch >= 0, "batch=", p.batch, " is negative");
  check(p.key_heads >= 1 && p.heads >= 1 && p.heads % p.key_heads == 0, p.key_heads,
        " key heads do not divide ", p.heads, " query heads");
  check(p.keys >= 1 && p.dim >= 1 && p.value_dim >= 1, "keys=", p.keys, ", dim=", p.dim,
        " and value_dim=", p.value_dim, " are at least 1");
}

// Heads of one task: all that share a key head, or fewer where there would be a thread without any.
int64_t heads_of_task(const RowProblem& p, int threads) {
  const int64_t ratio = p.heads / p.key_heads;
  const int64_t tasks = std::max<int64_t>(1, p.batch * p.key_heads);
  const int64_t parts = std::min(ratio, (threads + tasks - 1) / tasks);
  return (ratio + parts - 1) / parts;
}

const char* row_of(const AttentionTensor& t, int64_t size, int64_t batch, int64_t head) {
  return static_cast<const char*>(t.values) +
         size * (batch * t.batch_stride + head * t.head_stride);
}

}  // namespace

void row_attention(const RowProblem& p, void* out) {
  check_problem(p);
  const auto& kernel = lookup<RowAttention>(p.dtype);
  const int64_t size = size_of(p.dtype), ratio = p.heads / p.key_heads;
  const int64_t bytes = p.batch * p.key_heads * p.keys * (p.dim + p.value_dim) * size;
  const int threads = threads_for(bytes);
  const int64_t heads = heads_of_task(p, threads), parts = (ratio + heads - 1) / heads;
  parallel(threads, [&](int thread, int team) {
    Scratch scratch;
    const Range share = even_share(p.batch * p.key_heads * parts, thread, team);
    for (int64_t i = share.begin; i < share.end; ++i) {
      const int64_t b = i / (p.key_heads * parts), kv = i / parts % p.key_heads;
      const int64_t first = kv * ratio + i % parts * heads;
      const RowHeads task{row_of(p.q, size, b, first),
                          row_of(p.k, size, b, kv),
                          row_of(p.v, size, b, kv),
                          static_cast<char*>(out) + (b * p.heads + first) * p.value_dim * size,
                          p.q.head_stride,
                          p.k.row_stride,
                          p.v.row_stride,
                          std::min(heads, (kv + 1) * ratio - first),
                          p.keys,
                          p.dim,
                          p.value_dim,
                          p.scale};
      const auto floats = static_cast<size_t>(task.scratch_floats());
      kernel.run(task, static_cast<float*>(scratch.reserve(floats * sizeof(float))));
    }
  });
}

}  // namespace pysparse
