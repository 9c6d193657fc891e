#pragma once
// In which units marginals are summed, for CPU and GPU alike.
#include "pysparse/rng.h"

namespace pysparse {

// Marginals are summed as whole numbers, so that any order of the additions gives the same bits.
inline constexpr double kSumScale = 68719476736.0;       // 2^36
inline constexpr double kSquareScale = 1099511627776.0;  // 2^40: squares of 1e-4 need it
inline constexpr float kLargestMarginal = 1024.0f;       // its square still fits
inline constexpr int kLowBits = 48;                      // what a total keeps when it is spilled

inline constexpr int kMaxEmbedding = 256;
inline constexpr int64_t kMaxPaddedPlayers = 65536;  // a player is a 16-bit number

// The columns of a player's field, padded so that player = field * width + column.
PYSPARSE_EVERYWHERE inline int padded_width(int cols) {
  int width = 1;
  while (width < cols) width *= 2;
  return width;
}

}  // namespace pysparse
