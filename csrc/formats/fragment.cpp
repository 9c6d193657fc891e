// Row-major bitmap <-> 16 x 64 blocks in the order of tensor-core operands (device_layout.h).
#include <cstring>
#include <limits>

#include "pysparse/device_formats.h"
#include "pysparse/formats.h"
#include "strips.h"

namespace pysparse {
namespace {

using namespace layout;

template <class Visit>
void for_each_slot(const Visit& visit) {
  for (int half = 0; half < 8; ++half)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int slot = 4 * half; slot < 4 * half + 4; ++slot)
        visit(lane, slot, fragment_place(lane, slot / 8, slot % 8));
}

}  // namespace

int64_t fragment_count(const BitmapView& map, int64_t nnz, int32_t* offsets) {
  bitmap_validate(map, nnz);
  const int64_t strips = ceil_div(map.rows, kStripRows), blocks = ceil_div(map.cols, kBlockCols);
  parallel_for(strips, map.rows * map.cols, [&](int64_t strip) {
    StripReader reader(nullptr, map, strip);
    for (int64_t block = 0; block < blocks; ++block) {
      reader.load(block);
      const int64_t bytes = kHeaderBytes + 2 * reader.count();
      offsets[strip * blocks + block] = static_cast<int32_t>(ceil_div(bytes, kUnitBytes));
    }
  });
  int64_t total = 0, largest = 0;
  for (int64_t i = 0; i < strips * blocks; ++i) {
    const int64_t units = offsets[i];
    offsets[i] = static_cast<int32_t>(total);
    total += units;
    largest = std::max(largest, units);
  }
  check(total <= std::numeric_limits<int32_t>::max(), total,
        " units of 16 bytes are past 32-bit offsets; split the matrix");
  offsets[strips * blocks] = static_cast<int32_t>(total);
  return largest * kUnitBytes;
}

void fragment_pack(const uint16_t* source, const BitmapView& map, const int32_t* offsets,
                   uint8_t* stream) {
  const int64_t strips = ceil_div(map.rows, kStripRows), blocks = ceil_div(map.cols, kBlockCols);
  parallel_for(strips, map.rows * map.cols, [&](int64_t strip) {
    StripReader reader(source, map, strip);
    for (int64_t block = 0; block < blocks; ++block) {
      reader.load(block);
      const int64_t begin = offsets[strip * blocks + block],
                    end = offsets[strip * blocks + block + 1];
      auto* masks = reinterpret_cast<uint32_t*>(stream + begin * kUnitBytes);
      auto* next = reinterpret_cast<uint16_t*>(stream + begin * kUnitBytes + kHeaderBytes);
      std::memset(masks, 0, static_cast<size_t>((end - begin) * kUnitBytes));
      for_each_slot([&](int lane, int slot, Place at) {
        if (!reader.keeps(at)) return;
        masks[lane] |= 1u << slot;
        *next++ = reader.value(at);
      });
    }
  });
}

int64_t fragment_unpack(const uint8_t* stream, const int32_t* offsets, int64_t rows, int64_t cols,
                        uint16_t* target, uint8_t* bitmask, int64_t* row_offsets) {
  const int64_t blocks = ceil_div(cols, kBlockCols);
  return unpack_strips(rows, cols, target, bitmask, row_offsets,
                       [&](int64_t strip, int64_t block, StripWriter& writer) {
                         const uint8_t* data =
                             stream + int64_t{offsets[strip * blocks + block]} * kUnitBytes;
                         const auto* masks = reinterpret_cast<const uint32_t*>(data);
                         const auto* next = reinterpret_cast<const uint16_t*>(data + kHeaderBytes);
                         for_each_slot([&](int lane, int slot, Place at) {
                           if (masks[lane] >> slot & 1u) writer.put(at, *next++);
                         });
                       });
}

}  // namespace pysparse
