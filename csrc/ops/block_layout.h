#pragma once
// Where the columns of a token go: blocks of `width` columns, then narrow blocks for the columns
// that no group holds. Several tokens lie side by side within a block,
// packed[block][vector][width].
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace pysparse {

struct BlockLayout {
  int64_t cols, main_cols;  // columns of a token, and how many of them go to the wide blocks
  int64_t width, blocks;
  int64_t tail_width, tail_blocks;

  int64_t size() const { return width * blocks + tail_width * tail_blocks; }  // of one vector
  // One vector lies in the blocks as in a row of its own.
  bool keeps_order() const { return main_cols == cols || main_cols == width * blocks; }
};

template <class T, int64_t kWidth>
void place_blocks(const T* row, int64_t blocks, int64_t stride, T* target) {
  for (int64_t b = 0; b < blocks; ++b)
    std::memcpy(target + b * stride, row + b * kWidth, kWidth * sizeof(T));
}

// `count` columns into `blocks` blocks of `width`, the rest of them filled.
template <class T>
void place_part(const T* row, int64_t count, int64_t width, int64_t blocks, int vectors, T fill,
                T* target) {
  if (blocks == 0) return;
  const int64_t whole = count / width, stride = width * vectors;
  switch (width) {  // a constant width copies by single moves
    case 2:
      place_blocks<T, 2>(row, whole, stride, target);
      break;
    case 4:
      place_blocks<T, 4>(row, whole, stride, target);
      break;
    case 8:
      place_blocks<T, 8>(row, whole, stride, target);
      break;
    case 16:
      place_blocks<T, 16>(row, whole, stride, target);
      break;
    case 32:
      place_blocks<T, 32>(row, whole, stride, target);
      break;
    default:
      for (int64_t b = 0; b < whole; ++b)
        std::copy(row + b * width, row + (b + 1) * width, target + b * stride);
  }
  for (int64_t b = whole; b < blocks; ++b) {
    const int64_t left = std::clamp<int64_t>(count - b * width, 0, width);
    std::copy(row + b * width, row + b * width + left, target + b * stride);
    std::fill(target + b * stride + left, target + b * stride + width, fill);
  }
}

// Places vector `v` of `vectors`.
template <class T>
void place(const T* row, const BlockLayout& layout, int vectors, int v, T fill, T* packed) {
  place_part(row, layout.main_cols, layout.width, layout.blocks, vectors, fill,
             packed + v * layout.width);
  place_part(row + layout.main_cols, layout.cols - layout.main_cols, layout.tail_width,
             layout.tail_blocks, vectors, fill,
             packed + layout.width * layout.blocks * vectors + v * layout.tail_width);
}

}  // namespace pysparse
