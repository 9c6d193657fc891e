// RMSNorm: check, choose a kernel, share the rows out over the threads.
#include "pysparse/norm.h"

#include <cmath>

#include "pysparse/error.h"
#include "pysparse/parallel.h"

namespace pysparse {

void rms_norm(const NormView& norm, const void* x, int64_t rows, void* y) {
  check(norm.cols >= 1, "a row has at least one value, got ", norm.cols);
  check(rows >= 0, "rows=", rows, " is negative");
  check(norm.eps >= 0.0f && std::isfinite(norm.eps), "eps=", norm.eps,
        " is not a finite number of at least 0");
  check(norm.weight != nullptr, "a norm has a weight");
  const auto& kernel = lookup<RmsNorm>(norm.dtype);
  const int64_t row_bytes = norm.cols * size_of(norm.dtype);
  parallel(threads_for(rows * row_bytes), [&](int thread, int threads) {
    const Range share = even_share(rows, thread, threads);
    kernel.run(norm, static_cast<const char*>(x) + share.begin * row_bytes, share.end - share.begin,
               static_cast<char*>(y) + share.begin * row_bytes);
  });
}

}  // namespace pysparse
