#pragma once
// y = x W^T + b, for a tiled bitmap and for a dense weight: what a kernel file must provide, and
// the operations that check, choose a kernel and split the work.
#include "pysparse/views.h"

namespace pysparse {

// How a kernel wants the activations of a few tokens: blocks of `lanes` columns, token after token
// within a block, input[block][token][lane], the last block padded by zeros. Side by side like
// this, the tokens of one block share cache lines; rows of x, a power of two apart, would fight for
// the same cache set.
struct InputLayout {
  DType dtype;
  int lanes;
};

struct BitmapLinear {
  static constexpr const char* op = "linear";
  static constexpr const char* format = "bitmap";
  struct Kernel {
    InputLayout
        input;       // lanes = 2: a cell of 16 rows x 2 columns meets its two inputs side by side
    int max_tokens;  // per call; more tokens come in several calls
    // Writes rows [16 tile, 16 tile + 16) of `tokens` outputs.
    void (*run)(const TiledBitmapView& weight, int64_t tile, const void* input, int tokens,
                const OutputView& output, int64_t first_token);
  };
};

struct BitmapUnpack {
  static constexpr const char* op = "unpack";
  static constexpr const char* format = "bitmap";
  struct Kernel {
    // Writes the rows of one tile, `rows` of them (16 but at the end), at dense[row * cols].
    void (*run)(const TiledBitmapView& weight, int64_t tile, int64_t rows, void* dense);
  };
};

struct DenseLinear {
  static constexpr const char* op = "linear";
  static constexpr const char* format = "dense";
  struct Kernel {
    InputLayout input;
    int max_tokens;
    // Writes rows [row_begin, row_end) of `tokens` outputs.
    void (*run)(const DenseView& weight, int64_t row_begin, int64_t row_end, const void* input,
                int tokens, const OutputView& output, int64_t first_token);
  };
};

struct PairsLinear {
  static constexpr const char* op = "linear";
  static constexpr const char* format = "pairs";
  // A tile of tokens is as wide as the kernel says; the last one 16 or 32 wide where that is
  // enough.
  static constexpr int kNarrowest = 16;
  static constexpr int kNarrow = 32;
  static constexpr int kWidest = 64;
  static constexpr int width_for(int tokens, int widest) {
    return tokens <= kNarrowest ? kNarrowest : tokens <= kNarrow ? kNarrow : widest;
  }
  struct Kernel {
    DType input;  // of the transposed activations
    int width;    // tokens of a tile at most: 32 or 64
    // input[col][width] = x[token][col] for the columns of one range, in the order of tokens that
    // the kernel likes, zero beyond `tokens`; false if any value is not finite.
    bool (*transpose)(const void* x, int64_t cols, int tokens, int width, int64_t begin,
                      int64_t end, void* input);
    // Writes one block of rows for the tokens of one tile; `scratch` holds kScratch bytes.
    void (*run)(const PairsView& weight, int64_t row_block, const void* input, int tokens,
                int width, void* scratch, const OutputView& output, int64_t first_token);
  };
  static constexpr int64_t kScratch = kPairRows * kWidest * 8;
};

// Sizes that the caller claims for its buffers; checked against the shape before anything is read.
struct BufferSizes {
  int64_t values, masks, tile_offsets;
};

void bitmap_linear(const TiledBitmapView& weight, const BufferSizes& sizes, const void* x,
                   int64_t tokens, const OutputView& output);
struct PairsSizes {
  int64_t entries, row_order, counts, block_offsets;
};
void pairs_linear(const PairsView& weight, const PairsSizes& sizes, const void* x, int64_t tokens,
                  const OutputView& output);
void bitmap_unpack(const TiledBitmapView& weight, int64_t value_count, int64_t tile_count,
                   int64_t first_tile, int64_t rows, void* dense);
void dense_linear(const DenseView& weight, const void* x, int64_t tokens, const OutputView& output);

}  // namespace pysparse
