#pragma once
// Walks over the stored weights of an N:M tile.
#include <array>

#include "pysparse/nm.h"

namespace pysparse {

inline int read_index(const uint8_t* bytes, int64_t lane, int bits) {
  const int64_t bit = lane * bits;
  const int low = bytes[bit / 8];
  const int high = bit % 8 + bits > 8 ? bytes[bit / 8 + 1] : 0;
  return (low | high << 8) >> (bit % 8) & ((1 << bits) - 1);
}

inline void write_index(uint8_t* bytes, int64_t lane, int bits, int index) {
  const int64_t bit = lane * bits;
  const int shifted = index << (bit % 8);
  bytes[bit / 8] |= static_cast<uint8_t>(shifted & 0xff);
  if (shifted > 0xff) bytes[bit / 8 + 1] |= static_cast<uint8_t>(shifted >> 8);
}

// Where slot `slot` of a row's group lies: a step of the tile, and a lane of the step.
struct SlotPlace {
  int64_t step, lane;
};

inline SlotPlace place_of(const NmLayout& layout, int64_t row, int64_t group, int slot) {
  const int64_t j = group % layout.block_groups() * layout.n + slot;
  return {group / layout.block_groups() * layout.block_steps() + j / layout.per_row,
          row * layout.per_row + j % layout.per_row};
}

inline SlotPlace tail_place(const NmLayout& layout, int64_t row, int64_t col) {
  return {layout.blocks() * layout.block_steps() + col / layout.per_row,
          row * layout.per_row + col % layout.per_row};
}

// Where the slots of one row lie within a block: the same in every block.
struct BlockSlots {
  struct Slot {
    int64_t place, byte;  // of the value within the block, of the index within the block's bytes
    int shift;
  };
  std::array<Slot, kMaxGroup * 4> slots;

  BlockSlots(const NmLayout& layout, int64_t row) {
    for (int j = 0; j < layout.block_groups() * layout.n; ++j) {
      const int64_t step = j / layout.per_row, lane = row * layout.per_row + j % layout.per_row;
      const int64_t bit = lane * layout.bits();
      slots[j] = {step * layout.step_values() + lane, step * layout.step_bytes() + bit / 8,
                  static_cast<int>(bit % 8)};
    }
  }
};

// Calls visit(col, value's place in the tile) for each stored weight of one row of a tile, columns
// ascending. Zeros that fill up a group are passed over, as far as they can be told: where n is 1,
// and in the tail, a weight is stored if `is_kept(place)`.
template <class IsKept, class Visit>
void for_each_slot(const NmView& weight, int64_t tile, int64_t row, const IsKept& is_kept,
                   const Visit& visit) {
  const NmLayout& layout = weight.layout;
  const BlockSlots block_slots(layout, row);
  const int n = layout.n, m = layout.m, mask = (1 << layout.bits()) - 1;
  const int64_t block_values = layout.block_steps() * layout.step_values();
  const int64_t block_bytes = layout.block_steps() * layout.step_bytes();
  const uint8_t* indices = weight.indices + tile * layout.tile_bytes();
  for (int64_t group = 0; group < layout.groups(); ++group) {
    const auto* slots = block_slots.slots.data() + group % layout.block_groups() * n;
    const int64_t block = group / layout.block_groups();
    const uint8_t* bytes = indices + block * block_bytes;
    const auto index_of = [&](int slot) {  // the byte after the last index is padding
      const uint8_t* at = bytes + slots[slot].byte;
      return (at[0] | at[1] << 8) >> slots[slot].shift & mask;
    };
    int previous = -1;
    if (n > 1 && index_of(1) < index_of(0)) continue;  // an empty group starts by a descent
    for (int slot = 0; slot < n; ++slot) {
      const int index = index_of(slot);
      if (index <= previous) break;
      const int64_t place = block * block_values + slots[slot].place;
      if (n > 1 || is_kept(place)) visit(group * m + index, place);
      previous = index;
    }
  }
  for (int64_t col = 0; col < layout.tail_cols(); ++col) {
    const SlotPlace at = tail_place(layout, row, col);
    const int64_t place = at.step * layout.step_values() + at.lane;
    if (is_kept(place)) visit(layout.groups() * m + col, place);
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
