#pragma once
// Walks over the stored weights of an N:M tile.
#include <algorithm>
#include <array>

#include "pysparse/nm.h"

namespace pysparse {

inline int read_index(const uint8_t* bytes, int64_t lane, int bits) {
  const int64_t bit = lane * bits;
  const int low = bytes[bit / 8];
  const int high = bit % 8 + bits > 8 ? bytes[bit / 8 + 1] : 0;
  return (low | high << 8) >> (bit % 8) & ((1 << bits) - 1);
}

struct SlotPlace {
  int64_t step, lane;
};

inline SlotPlace tail_place(const NmLayout& layout, int64_t row, int64_t col) {
  return {layout.blocks() * layout.block_steps() + col / layout.per_row,
          row * layout.per_row + col % layout.per_row};
}

// Walks over the groups of one row of a tile, and says where each slot of a group lies.
class BlockCursor {
 public:
  BlockCursor(const NmLayout& layout, int64_t row, int64_t first_block = 0)
      : n_(layout.n),
        mask_((1 << layout.bits()) - 1),
        block_slots_(layout.block_groups() * layout.n),
        block_values_(layout.block_steps() * int64_t{layout.step_values()}),
        block_bytes_(layout.block_steps() * int64_t{layout.step_bytes()}),
        group_(first_block * layout.block_groups()),
        first_value_(first_block * block_values_),
        first_byte_(first_block * block_bytes_) {
    for (int j = 0; j < block_slots_; ++j) {  // the same in every block
      const int64_t step = j / layout.per_row, lane = row * layout.per_row + j % layout.per_row;
      const int64_t bit = lane * layout.bits();
      slots_[j] = {step * layout.step_values() + lane, step * layout.step_bytes() + bit / 8,
                   static_cast<int>(bit % 8)};
    }
  }

  int64_t group() const { return group_; }
  int64_t place(int slot) const { return first_value_ + slots_[first_slot_ + slot].place; }
  // The byte after the last index is padding.
  int read_index(const uint8_t* bytes, int slot) const {
    const Slot& at = slots_[first_slot_ + slot];
    const uint8_t* field = bytes + first_byte_ + at.byte;
    return (field[0] | field[1] << 8) >> at.shift & mask_;
  }
  void write_index(uint8_t* bytes, int slot, int index) const {
    const Slot& at = slots_[first_slot_ + slot];
    uint8_t* field = bytes + first_byte_ + at.byte;
    const int shifted = index << at.shift;
    field[0] |= static_cast<uint8_t>(shifted & 0xff);
    if (shifted > 0xff) field[1] |= static_cast<uint8_t>(shifted >> 8);
  }
  void next_group() {
    ++group_;
    first_slot_ += n_;
    if (first_slot_ < block_slots_) return;
    first_slot_ = 0;
    first_value_ += block_values_;
    first_byte_ += block_bytes_;
  }

 private:
  struct Slot {
    int64_t place, byte;  // of the value within the block, of the index within the block's bytes
    int shift;
  };

  int n_, mask_, block_slots_;
  int64_t block_values_, block_bytes_;
  int64_t group_, first_value_, first_byte_;
  int first_slot_ = 0;
  std::array<Slot, kMaxGroup * 4> slots_;
};

// Calls visit(col, value's place in the tile) for each stored weight of one row of a tile, columns
// ascending. Zeros that fill up a group are passed over, as far as they can be told: where n is 1,
// and in the tail, a weight is stored if `is_kept(place)`. Starts at a block of groups.
template <class IsKept, class Visit>
void for_each_slot(const NmView& weight, int64_t tile, int64_t row, const IsKept& is_kept,
                   const Visit& visit, int64_t first_block = 0) {
  const NmLayout& layout = weight.layout;
  const int n = layout.n, m = layout.m;
  const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
  for (BlockCursor cursor(layout, row, first_block); cursor.group() < layout.groups();
       cursor.next_group()) {
    // An empty group starts by a descent.
    if (n > 1 && cursor.read_index(indices, 1) < cursor.read_index(indices, 0)) continue;
    int previous = -1;
    for (int slot = 0; slot < n; ++slot) {
      const int index = cursor.read_index(indices, slot);
      if (index <= previous) break;
      const int64_t place = cursor.place(slot);
      if (n > 1 || is_kept(place)) visit(cursor.group() * m + index, place);
      previous = index;
    }
  }
  for (int64_t col = 0; col < layout.tail_cols(); ++col) {
    const SlotPlace at = tail_place(layout, row, col);
    const int64_t place = at.step * layout.step_values() + at.lane;
    if (is_kept(place)) visit(layout.groups() * m + col, place);
  }
}

// Writes rows of a tile from the first column of a block on; convert(value, column, row) makes what
// is written.
template <class Value, class T, class Convert>
void unpack_from(const NmView& weight, int64_t tile, int64_t rows, int64_t first_block, T* dense,
                 const Convert& convert) {
  const NmLayout& layout = weight.layout;
  const Value* values = static_cast<const Value*>(weight.values) + tile * layout.tile_values();
  const int64_t first_col = first_block * layout.block_cols();
  for (int64_t r = 0; r < rows; ++r) {
    T* row = dense + r * layout.cols;
    std::fill(row + first_col, row + layout.cols, T{});
    for_each_slot(
        weight, tile, r, [](int64_t) { return true; },
        [&](int64_t col, int64_t place) { row[col] = convert(values[place], col, r); },
        first_block);
  }
}

// Where column `col` of token 0 lies in a kernel's blocks of activations, and how far the next
// token is.
struct InputPlace {
  int64_t first, stride;
};

inline InputPlace input_place(const NmLayout& layout, int64_t col, int tokens) {
  const int64_t main_cols = layout.groups() * layout.m;
  if (col < main_cols) {
    const int64_t width = layout.block_cols();
    return {col / width * width * tokens + col % width, width};
  }
  const int64_t width = layout.per_row, at = col - main_cols;
  return {(layout.blocks() * layout.block_cols() + at / width * width) * tokens + at % width,
          width};
}

}  // namespace pysparse
