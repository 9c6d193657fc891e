#pragma once
// Which weights go: the smallest |w| * scale of each row, or of each group of m in a row. Exact
// counts; of equal scores the lower column goes first, as a stable sort would have it.
#include <cstring>

#include "pysparse/kernel_table.h"

namespace pysparse {

// Scores become whole numbers of the same order: for floats without a sign their bits, otherwise
// the bits with those below the sign inverted. Both zeros are one.
inline constexpr int32_t kInfinityKey = 0x7f800000;
inline constexpr int32_t kLastKey = 0x7fffffff;  // of no score: padding, never chosen

inline int32_t key_of(float score) {
  int32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

inline float score_of(float weight, const float* scale, int64_t col) {
  if (!scale) return weight;
  const float product = (weight < 0 ? -weight : weight) * scale[col];
  return product < 0 ? -product : product;
}

struct ScoredView {
  const void* weight;  // [rows][cols]
  const float* scale;  // [cols]; null: the weights are the scores themselves, with their signs
  int64_t rows, cols;
  DType dtype;
};

struct Selection {
  uint8_t* keep;  // [rows][cols], 1 where kept
  void* pruned;   // [rows][cols] in the weight's dtype, zero where not kept; may be null
};

struct RowSelect {
  static constexpr const char* op = "select";
  static constexpr const char* format = "row";
  struct Kernel {
    // Prunes the `count` smallest of each row of [begin, end); returns how many scores are NaN.
    // `keys` holds key_count(cols) words, aligned to 64 bytes.
    int64_t (*run)(const ScoredView& view, int64_t count, int64_t begin, int64_t end, int32_t* keys,
                   const Selection& out);
  };
  static constexpr int64_t kLanes = 16;  // of the widest kernel
  static constexpr int64_t padded(int64_t cols) { return (cols + kLanes - 1) / kLanes * kLanes; }
  static constexpr int64_t key_count(int64_t cols) { return 2 * padded(cols) + 2 * kLanes; }
};

struct NmSelect {
  static constexpr const char* op = "select";
  static constexpr const char* format = "nm";
  struct Kernel {
    bool (*covers)(int m);
    // Keeps the n largest of every m columns, and the columns of a short group at the end.
    int64_t (*run)(const ScoredView& view, int n, int m, int64_t begin, int64_t end,
                   const Selection& out);
  };
};

// Throw for impossible sizes, for a scale that is negative, and for scores that are NaN.
void select_rows(const ScoredView& view, int64_t count, const Selection& out);
void select_nm(const ScoredView& view, int n, int m, const Selection& out);
const NmSelect::Kernel& nm_select_generic(DType dtype);  // takes every m

}  // namespace pysparse
