// Rotary position embedding of queries and keys in one call, positions shared out over the threads.
#include "pysparse/rotary.h"

#include "pysparse/error.h"
#include "pysparse/parallel.h"

namespace pysparse {
namespace {

void check_problem(const RotaryProblem& p) {
  check(p.batch >= 0 && p.rows >= 0, "batch=", p.batch, " or rows=", p.rows, " is negative");
  check(p.q.heads >= 1 && p.k.heads >= 1, p.q.heads, " query and ", p.k.heads,
        " key heads: at least 1 of each");
  check(p.dim >= 2 && p.dim % 2 == 0, "dim=", p.dim, " is not an even number of at least 2");
}

}  // namespace

void rotary(const RotaryProblem& p) {
  check_problem(p);
  const auto& kernel = lookup<Rotary>(p.dtype);
  const int64_t size = size_of(p.dtype);
  const auto at = [size](const void* base, int64_t elements) {
    return static_cast<const char*>(base) + elements * size;
  };
  const RotaryAngles& a = p.angles;
  parallel_for(p.batch * p.rows, p.batch * p.rows * (p.q.heads + p.k.heads) * p.dim * size,
               [&](int64_t i) {
                 const int64_t b = i / p.rows, n = i % p.rows;
                 for (const RotaryTensor* t : {&p.q, &p.k})
                   kernel.run({at(t->x.values, b * t->x.batch_stride + n * t->x.row_stride),
                               static_cast<char*>(t->y.values) +
                                   (b * t->y.batch_stride + n * t->y.row_stride) * size,
                               t->x.head_stride, t->y.head_stride, t->heads, p.dim,
                               at(a.cosine, b * a.cosine_batch_stride + n * a.cosine_row_stride),
                               at(a.sine, b * a.sine_batch_stride + n * a.sine_row_stride)});
               });
}

}  // namespace pysparse
