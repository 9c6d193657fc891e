// Runs selection and sweep, host side and all, on host threads.
#include "pruning_host.cuh"

using namespace pysparse::cuda;

extern "C" int rows(const ScoredMatrix* matrix, int64_t count, bool joint, const Chosen* out, Damage* damage) {
  return select_rows(*matrix, count, joint, *out, damage, {0, nullptr});
}
extern "C" int groups(const ScoredMatrix* matrix, int n, int m, const Chosen* out, Damage* damage) {
  return select_nm(*matrix, n, m, *out, damage, {0, nullptr});
}
extern "C" int sweep(const ObsSweep* problem, float* errors, Damage* damage) {
  return obs_sweep(*problem, errors, damage, {0, nullptr});
}
extern "C" int struct_bytes(int which) {
  const int sizes[] = {sizeof(ScoredMatrix), sizeof(Chosen), sizeof(ObsSweep)};
  return sizes[which];
}
