#pragma once
// What the CUDA half offers: plain pointers and sizes, a stream, a cudaError_t back. No allocation,
// no synchronisation, so every call can be captured in a graph. Pointers are device memory, aligned
// to 16 bytes.
#include <cstdint>

namespace pysparse::cuda {

enum class DType : int { kBFloat16 = 0, kFloat16 = 1 };
enum class Packing : int { kFragment = 0, kPair = 1 };

struct Target {
  int device;
  void* stream;
};

// y[tokens][rows] = x[tokens][cols] W^T + bias; bias may be null.
struct Product {
  const void* x;
  const void* bias;
  void* y;
  int tokens, rows, cols;
  DType dtype;
};

struct DeltaWeight {
  const void* values;
  const uint32_t* deltas;
  const int32_t* row_groups;
  const int32_t* chunk_cols;
};

// Groups of 1 << bits columns hold n entries each (NmRows in device_layout.h).
struct NmWeight {
  const void* values;
  const uint8_t* places;
  int n, bits;
};

struct StripWeight {
  const uint8_t* stream;
  const int32_t* offsets;  // null for pairs, whose blocks have one size
  int largest_block;       // bytes
  Packing packing;
};

// Part of a matrix to write out densely: `rows` rows from `first_row` on (a multiple of 16 for
// strips).
struct Rows {
  void* dense;
  int first_row, rows, total_rows, cols;
};

int delta_linear(const DeltaWeight& weight, const Product& product, const Target& target);
int delta_unpack(const DeltaWeight& weight, const Rows& rows, const Target& target);

int nm_linear(const NmWeight& weight, const Product& product, const Target& target);
int nm_unpack(const NmWeight& weight, const Rows& rows, const Target& target);

// Floats that strip_linear needs as workspace, 0 for none.
int64_t strip_workspace(const StripWeight& weight, const Product& product, int device);
int strip_linear(const StripWeight& weight, const Product& product, float* workspace,
                 const Target& target);
int strip_unpack(const StripWeight& weight, const Rows& rows, const Target& target);

int device_count();
// Shared memory that a thread block may have, in bytes; 0 when the device cannot be asked.
int shared_bytes(int device);
const char* error_text(int error);

}  // namespace pysparse::cuda
