#pragma once
// The team of omp_team.h out of std::thread, for builds under the thread sanitizer: libgomp waits
// on futexes that the sanitizer does not see, so it would call every handover between its threads a
// race. What the threads of a team share, and how kernels split their work, is the same.
#include <omp.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace pysparse {

struct Team {
  int size;
  int waiting = 0;
  long passed = 0;  // barriers that the whole team has left behind
  std::mutex mutex;
  std::condition_variable all_here;

  explicit Team(int threads) : size(threads) {}

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const long here = passed;
    if (++waiting == size) {
      waiting = 0;
      ++passed;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return passed != here; });
    }
  }
};

inline thread_local Team* current_team = nullptr;

inline bool in_team() { return current_team != nullptr; }
inline int default_threads() { return omp_get_max_threads(); }

template <class Body>
void run_team(int threads, const Body& body) {
  Team team(threads);
  const auto member = [&](int thread) {
    current_team = &team;
    body(thread, threads);
    current_team = nullptr;
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(member, thread);
  member(0);
  for (std::thread& other : others) other.join();
}

inline void team_barrier(int threads) {
  if (threads > 1) current_team->barrier();
}

}  // namespace pysparse
