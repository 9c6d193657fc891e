// A child of fork() has the bookkeeping of its parent's OpenMP pool but none of its threads: its
// first parallel region, ours or torch's, would wait for them for ever. So the thread that forks
// dissolves its pool before, and parent and child each make a new one when they next need it.
#include <omp.h>
#include <pthread.h>

namespace pysparse {
namespace {

// Has no effect inside a parallel region, where forking and then computing cannot work anyhow.
void dissolve_pool() { omp_pause_resource(omp_pause_soft, omp_get_initial_device()); }

const int registered = pthread_atfork(dissolve_pool, nullptr, nullptr);

}  // namespace
}  // namespace pysparse
