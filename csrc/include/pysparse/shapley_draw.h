#pragma once
// Random words and permutations in bulk, the same on every ISA level.
#include "pysparse/kernel_table.h"
#include "pysparse/rng.h"

namespace pysparse {

inline constexpr int64_t kMaxPlayers = int64_t{1} << 24;  // a step must fit beside its attempts

struct ShapleyDraw {
  static constexpr const char* op = "shapley";
  static constexpr const char* format = "permutation";
  struct Kernel {
    // `count` words of the stream, from its first block on.
    void (*words)(const Stream& stream, int64_t count, uint32_t* words);
    // Fisher-Yates: partner[i] = i + uniform(0 .. players - 1 - i) is swapped with i, i ascending.
    void (*partners)(const Stream& stream, int64_t players, uint32_t* partner);
  };
  // Both write whole groups: their arrays have room for padded(count) words.
  static constexpr int64_t kGroup = 64;
  static constexpr int64_t padded(int64_t count) { return (count + kGroup - 1) / kGroup * kGroup; }
};

struct DrawView {
  uint64_t seed;
  uint64_t first;  // sample of the first row
  uint32_t visit, purpose;
  int64_t rows, cols;
};

// Row r is drawn by the stream of sample first + r; [rows][cols] each. Throw for counters that do
// not fit.
void draw_words(const DrawView& view, uint32_t* words);
void draw_permutations(const DrawView& view, int32_t* orders);

}  // namespace pysparse
