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

// ---- n:m packing: aligned groups of m columns that hold n entries each
// ------------------------------------------------------------- A group that keeps fewer is filled
// up. A vector is what a lane loads at once: 8 entries of one rank from 8 groups, and their places
// in these groups, lowest bits first. A run is 8 groups, hence n vectors; rows are whole runs, so
// columns may reach 8 m - 1 past the matrix's last. A row is cut into blocks of as many runs as
// its lanes hold; the j-th group of all runs of a block are neighbours, so that lanes which read
// at the same time are spread over shared memory's banks.
inline constexpr int kVectorEntries = 8;
inline constexpr int kNmLeastBits = 2, kNmMostBits = 4;  // groups of 4, 8 and 16 columns
inline constexpr int64_t kNmMostVectors = (int64_t{1} << 31) - kLanes;  // 32 bits count them

struct NmRows {
  int n, bits;  // entries of a group of 1 << bits columns
  int runs;     // of a row
  int width;    // lanes that share a row: a power of two, at least n

  PYSPARSE_HD constexpr int vectors() const { return runs * n; }
  PYSPARSE_HD constexpr int columns() const { return runs * kVectorEntries << bits; }
  PYSPARSE_HD constexpr int block_runs() const { return width / n; }
  PYSPARSE_HD constexpr int blocks() const { return (runs + block_runs() - 1) / block_runs(); }
  // Runs of one block: the last has what is left.
  PYSPARSE_HD constexpr int runs_of(int block) const {
    const int left = runs - block * block_runs();
    return left < block_runs() ? left : block_runs();
  }
  // First group of a block.
  PYSPARSE_HD constexpr int first_group(int block) const {
    return block * block_runs() * kVectorEntries;
  }
  // Group of entry j of a vector; its rank there is vector % n.
  PYSPARSE_HD constexpr int group(int vector, int j) const {
    const int block = vector / (block_runs() * n), own = vector / n % block_runs();
    return first_group(block) + j * runs_of(block) + own;
  }
  // The same backwards: entry j of which vector holds the entry of `rank` of a group.
  PYSPARSE_HD constexpr int entry_of(int group) const {
    const int block = group / first_group(1);
    return (group - first_group(block)) / runs_of(block);
  }
  PYSPARSE_HD constexpr int vector_of(int group, int rank) const {
    const int block = group / first_group(1);
    const int own = (group - first_group(block)) % runs_of(block);
    return (block * block_runs() + own) * n + rank;
  }
};

// Short rows are shared by fewer lanes, which then have two blocks each all the same.
PYSPARSE_HD constexpr NmRows nm_rows(int n, int bits, int cols) {
  const int run_columns = kVectorEntries << bits;
  NmRows rows{n, bits, static_cast<int>(ceil_div(cols, run_columns)), kLanes};
  while (rows.width > 8 && rows.vectors() <= rows.width && 2 * n <= rows.width) rows.width /= 2;
  return rows;
}

}  // namespace pysparse::layout
