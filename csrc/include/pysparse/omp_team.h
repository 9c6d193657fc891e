#pragma once
// A team of threads is an OpenMP team; see std_team.h for the one that a thread sanitizer can
// follow.
#include <omp.h>

namespace pysparse {

inline bool in_team() { return omp_in_parallel(); }
inline int default_threads() { return omp_get_max_threads(); }

// Calls body(thread, threads) once on each thread; fewer than asked for may come.
template <class Body>
void run_team(int threads, const Body& body) {
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

// Waits until all `threads` of the team are here.
inline void team_barrier(int threads) {
  if (threads > 1) {  // alone, the barrier would be that of a caller's parallel region
#pragma omp barrier
  }
}

}  // namespace pysparse
