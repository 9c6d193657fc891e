// Runs the embedding kernels, host side and all, on host threads.
#include "embedding_host.cuh"

using namespace pysparse::cuda;

extern "C" int check(const EmbeddingTable* table, const EmbeddingIds* ids, const EmbeddingBags* bags, uint64_t* faults) {
  return embedding_check(*table, *ids, bags, faults, {0, nullptr});
}
extern "C" int look_up(const EmbeddingTable* table, const EmbeddingIds* ids, void* out) {
  return embedding_lookup(*table, *ids, out, {0, nullptr});
}
extern "C" int add_bags(const EmbeddingTable* table, const EmbeddingIds* ids, const EmbeddingBags* bags, void* out) {
  return embedding_bag(*table, *ids, *bags, out, {0, nullptr});
}
extern "C" int struct_bytes(int which) {
  const int sizes[] = {sizeof(EmbeddingTable), sizeof(EmbeddingIds), sizeof(EmbeddingBags)};
  return sizes[which];
}
