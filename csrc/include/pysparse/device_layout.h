#pragma once
// Where each weight lives in the packings that GPU kernels stream. Packers, kernels and tests share
// these maps, so the arithmetic that g++ tests exhaustively is the arithmetic that ships.
#include <cstdint>

#ifdef __CUDACC__
#define PYSPARSE_HD __host__ __device__
#else
#define PYSPARSE_HD
#endif

namespace pysparse::layout {

inline constexpr int kLanes = 32;
inline constexpr int kUnitBytes = 16;  // asynchronous copies move whole units
inline constexpr uint16_t kFiller =
    0x8000;  // -0.0 in both 16-bit types: adds nothing, never a stored weight

// ---- delta packing: rows of 4-bit column steps
// ------------------------------------------------------------- A row is a run of groups of 8
// entries; entry i lies (nibble i) + 1 columns after the one before it. Fillers bridge gaps above
// 16 columns and complete the last group, so columns may reach 7 past the matrix's last.
inline constexpr int kGroupEntries = 8;
inline constexpr int kLongestStep = 16;
inline constexpr int kChunkGroups = 64;  // two groups per lane: what a warp takes at a time
inline constexpr int kColumnSlack = 8;   // zero inputs behind the last column

// Index of a chunk's starting column. Every row start opens a chunk, so rows share no slot: before
// row r there are at most row_groups[r] / 64 + r chunks.
PYSPARSE_HD constexpr int64_t chunk_slot(int64_t row, int64_t row_group, int64_t chunk) {
  return row_group / kChunkGroups + row + chunk;
}
PYSPARSE_HD constexpr int64_t chunk_slots(int64_t rows, int64_t groups) {
  return groups / kChunkGroups + rows + 1;
}

// ---- strips of 16 rows in blocks of 64 columns
// ---------------------------------------------------------------
inline constexpr int kStripRows = 16;
inline constexpr int kBlockCols = 64;
inline constexpr int kHeaderBytes = 4 * kLanes;  // one word per lane in front of a block's values

struct Place {
  int row, col;  // inside the 16 x 64 block
};

// Element i of a lane's A operand of mma.m16n8k16 lies in row lane / 4, or 8 below.
PYSPARSE_HD constexpr int operand_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }

// Fragment packing: bit 8 q + i of a lane's mask is element i of the A operand of the block's q-th
// mma.m16n8k16. The columns are permuted so that lane % 4 owns 16 neighbouring ones: its B operands
// of all four products are then 32 consecutive bytes of a token. Values follow by q, then half of i
// (i / 4), then lane, then i: lanes then read neighbouring words at the same time.
PYSPARSE_HD constexpr Place fragment_place(int lane, int q, int i) {
  return {operand_row(lane, i), 16 * (lane % 4) + 4 * q + 2 * (i / 4) + i % 2};
}

// Pair packing (two of four): the block's m-th mma.sp.m16n8k32 (m = 0, 1) multiplies 8 groups of 4
// columns. Its k axis is permuted as well: lanes with even lane % 4 read the first half of each
// group, odd ones the second.
PYSPARSE_HD constexpr int pair_group_col(int m, int group) {
  return 32 * (group % 2) + 4 * (4 * m + group / 2);
}
// Group that elements i and i ^ 1 of a lane's compressed A operand come from.
PYSPARSE_HD constexpr int pair_group(int lane, int i) { return lane % 4 + 4 * (i / 4); }
// The lane whose metadata word describes a group of row r, and the first of its 4 bits there.
PYSPARSE_HD constexpr int pair_meta_lane(int m, int row, int group) {
  return 4 * (row % 8) + 2 * m + group / 4;
}
PYSPARSE_HD constexpr int pair_meta_bit(int row, int group) {
  return 16 * (row / 8) + 4 * (group % 4);
}
inline constexpr int kPairBlockBytes = kHeaderBytes + 2 * kLanes * 8 * 2;

// Where the 32-bit word of columns (2 w, 2 w + 1) of a block goes in the staged inputs.
PYSPARSE_HD constexpr int fragment_input_word(int w) { return w; }
PYSPARSE_HD constexpr int pair_input_word(int w) { return (2 * (w / 16) + w % 2) * 8 + w % 16 / 2; }

PYSPARSE_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace pysparse::layout
