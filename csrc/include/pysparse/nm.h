#pragma once
// n of every m consecutive inputs kept: values at fixed places, so no mask and no count is needed,
// only where in its group each value belongs.
#include "pysparse/int8.h"
#include "pysparse/kernel_table.h"
#include "pysparse/views.h"

namespace pysparse {

inline constexpr int kMaxGroup = 64;
inline constexpr int64_t kIndexPadding = 64;  // bytes that a full load past the last may touch

constexpr int greatest_common_divisor(int a, int b) {
  return b == 0 ? a : greatest_common_divisor(b, a % b);
}

// How the kept weights of a matrix lie. A step is one 512-bit register: 16 rows x `per_row` values,
// 2 of 16 bits (or two registers of 32) or 4 of 8. A block is the fewest groups that fill whole
// steps. Columns that fill no group, the tail, are stored densely in steps of their own.
struct NmLayout {
  int n, m, per_row;
  int64_t rows, cols;

  constexpr int bits() const {  // of an index
    int count = 1;
    while ((1 << count) < m) ++count;
    return count;
  }
  constexpr int block_groups() const { return per_row / greatest_common_divisor(n, per_row); }
  constexpr int block_steps() const { return block_groups() * n / per_row; }
  constexpr int block_cols() const { return block_groups() * m; }
  constexpr int step_values() const { return static_cast<int>(kTileRows) * per_row; }
  constexpr int step_bytes() const { return 2 * per_row * bits(); }  // of indices
  int64_t groups() const { return cols / m; }
  int64_t blocks() const { return (groups() + block_groups() - 1) / block_groups(); }
  int64_t tail_cols() const { return cols % m; }
  int64_t tail_steps() const { return (tail_cols() + per_row - 1) / per_row; }
  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t tile_values() const {
    return (blocks() * block_steps() + tail_steps()) * int64_t{step_values()};
  }
  int64_t tile_bytes() const { return blocks() * block_steps() * int64_t{step_bytes()}; }
};

// values[tile][step][row][per_row]; indices[tile][step]: one of bits() bits for each value, lowest
// first. The kept weights of a group lie in ascending order. A group that keeps fewer repeats its
// last index; one that keeps none has indices 1, 0, 0, ... (0 where n is 1). Such places hold
// zeros.
struct NmView {
  const void* values;
  const uint8_t* indices;
  NmLayout layout;
};

struct NmLinear {
  static constexpr const char* op = "linear";
  static constexpr const char* format = "nm";
  struct Kernel {
    DType input;     // of the activations, input[block][token][block_cols], then the tail's steps
    int max_tokens;  // per call
    bool (*covers)(int n, int m);
    // Writes rows [16 tile, 16 tile + 16) of `tokens` outputs.
    void (*run)(const NmView& weight, int64_t tile, const void* input, int tokens,
                const OutputView& output, int64_t first_token);
  };
};

struct NmInt8Linear {
  static constexpr const char* op = "linear";
  static constexpr const char* format = "nm-int8";  // dtype: of the activations
  struct Kernel {
    QuantizeToken quantize;
    int max_vectors;
    bool (*covers)(int n, int m);
    void (*run)(const NmView& weight, const RowScales& scales, int64_t tile,
                const QuantizedTokens& input, const OutputView& output, int64_t first_token);
  };
};

struct NmUnpack {
  static constexpr const char* op = "unpack";
  static constexpr const char* format = "nm";
  struct Kernel {
    bool (*covers)(int n, int m);
    // Writes the rows of one tile, `rows` of them (16 but at the end), at dense[row * cols].
    void (*run)(const NmView& weight, int64_t tile, int64_t rows, void* dense);
  };
};

struct NmInt8Unpack {
  static constexpr const char* op = "unpack";
  static constexpr const char* format = "nm-int8";  // dtype: of the dense rows
  struct Kernel {
    int64_t group_multiple;
    bool (*covers)(int n, int m);
    void (*run)(const NmView& weight, const RowScales& scales, int64_t tile, int64_t rows,
                void* dense);
  };
};

inline bool covers_all(int, int) { return true; }
// The patterns that the vector kernels are written for.
inline bool covers_common(int n, int m) {
  return (m == 4 && n <= 2) || (m == 8 && (n == 1 || n == 2 || n == 4)) || (m == 16 && n == 2);
}

// The generic kernels, which take every pattern.
const NmLinear::Kernel& nm_generic(DType dtype);
const NmInt8Linear::Kernel& nm_int8_generic(DType dtype);
const NmUnpack::Kernel& nm_unpack_generic(DType dtype);
const NmInt8Unpack::Kernel& nm_int8_unpack_generic(DType dtype);
// The same product with the zeros written out, x[token][col]: spreads a NaN or an infinity as
// dense.
void nm_run_as_dense(const NmView& weight, int64_t tile, const void* x, int64_t tokens,
                     const OutputView& output);

struct NmSizes {
  int64_t values, indices;
};

void nm_linear(const NmView& weight, const NmSizes& sizes, const void* x, int64_t tokens,
               const OutputView& output);
void nm_int8_linear(const NmView& weight, const NmSizes& sizes, const RowScales& scales,
                    int64_t scale_count, int64_t sum_count, const void* x, int64_t tokens,
                    int parts, const OutputView& output);

// Throws for an impossible pattern or shape.
void nm_check_layout(const NmLayout& layout);
// Throws unless the arrays have the layout's sizes and every index lies inside its group.
void nm_validate(const NmView& weight, const NmSizes& sizes);
// Throws, naming the first group that keeps more than n.
void nm_check_pattern(const BitmapView& map, int n, int m);
// Outputs: values [tiles * tile_values], indices [tiles * tile_bytes], zero beyond. Checks all.
void nm_pack(const void* values, int64_t word, const BitmapView& map, int64_t nnz,
             const NmLayout& layout, void* packed, uint8_t* indices);
// Outputs: bitmask and row_offsets; returns the number of values, which nm_unpack_values then
// writes.
int64_t nm_unpack_mask(const NmView& weight, int64_t word, uint8_t* bitmask, int64_t* row_offsets);
void nm_unpack_values(const NmView& weight, int64_t word, const int64_t* row_offsets, void* values);
// Writes rows of the dense matrix, `rows` of them from a tile's first on.
void nm_unpack(const NmView& weight, const NmSizes& sizes, int64_t first_tile, int64_t rows,
               DType dtype, void* dense);
void nm_int8_unpack(const NmView& weight, const NmSizes& sizes, const RowScales& scales,
                    int64_t first_tile, int64_t rows, DType dtype, void* dense);
// row_sums as in RowScales.
void nm_row_sums(const NmView& weight, int64_t group_cols, int32_t* row_sums);

}  // namespace pysparse
