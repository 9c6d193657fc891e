#pragma once
// Threads. torch's wheel ships libgomp.so.1 under that soname, so its pool and ours are one, and
// torch.set_num_threads rules both. Work is split by owner: each output has one writer and one
// order of summation, so results are bit-equal for any number of threads.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>

#include "pysparse/error.h"
#ifdef PYSPARSE_STD_THREADS
#include "pysparse/std_team.h"
#else
#include "pysparse/omp_team.h"
#endif

namespace pysparse {

inline constexpr long kMaxThreads = 4096;

inline int num_threads() {
  static const int wanted = [] {
    const char* text = std::getenv("PYSPARSE_NUM_THREADS");
    if (!text || !*text) return 0;
    char* end = nullptr;
    const long count = std::strtol(text, &end, 10);
    check(*end == '\0' && count >= 1 && count <= kMaxThreads, "PYSPARSE_NUM_THREADS=", text,
          " is not a number of threads from 1 to ", kMaxThreads);
    return static_cast<int>(count);
  }();
  if (in_team()) return 1;
  return wanted > 0 ? wanted : default_threads();
}

// Waking a thread costs some microseconds: give each at least this many bytes to stream.
inline constexpr int64_t kBytesPerThread = 48 << 10;

inline int threads_for(int64_t bytes) {
  return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, num_threads()));
}

// Calls body(thread, threads) once on each of `threads` threads. No exception may leave a thread of
// the team, so what bodies throw is carried out of it: of several threads' exceptions that of the
// lowest, as one thread would throw.
template <class Body>
void parallel(int threads, const Body& body) {
  if (threads <= 1) return body(0, 1);
  std::exception_ptr thrown;
  std::mutex throwing;
  int thrower = threads;
  run_team(threads, [&](int thread, int team) {
    try {
      body(thread, team);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(throwing);
      if (thread < thrower) thrower = thread, thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

struct Range {
  int64_t begin, end;
};

inline Range even_share(int64_t count, int thread, int threads) {
  return {count * thread / threads, count * (thread + 1) / threads};
}

// Calls body(index) for each index in [0, count), in contiguous shares.
template <class Body>
void parallel_for(int64_t count, int64_t bytes, const Body& body) {
  parallel(threads_for(bytes), [&](int thread, int threads) {
    const Range share = even_share(count, thread, threads);
    for (int64_t i = share.begin; i < share.end; ++i) body(i);
  });
}

}  // namespace pysparse
