// Row-major bitmap <-> two-of-four blocks for the sparse tensor cores (device_layout.h).
#include <cstring>

#include "pysparse/device_formats.h"
#include "pysparse/formats.h"
#include "strips.h"

namespace pysparse {
namespace {

using namespace layout;

struct Choice {
  int first, second;  // ascending positions inside the group of four
  bool has_first, has_second;
};

// The two positions to store of a group whose kept bits are `kept`; lone and missing ones get a
// filler beside them.
Choice choose(unsigned kept) {
  if (kept == 0) return {0, 1, false, false};
  const int low = __builtin_ctz(kept), high = 31 - __builtin_clz(kept);
  if (low != high) return {low, high, true, true};
  return low < 3 ? Choice{low, low + 1, true, false} : Choice{2, 3, false, true};
}

}  // namespace

void pair_pack(const uint16_t* source, const BitmapView& map, int64_t nnz, uint8_t* stream) {
  bitmap_validate(map, nnz);
  const int64_t strips = ceil_div(map.rows, kStripRows), blocks = ceil_div(map.cols, kBlockCols);
  parallel_for(strips, map.rows * map.cols, [&](int64_t strip) {
    StripReader reader(source, map, strip);
    for (int64_t block = 0; block < blocks; ++block) {
      reader.load(block);
      uint8_t* data = stream + (strip * blocks + block) * kPairBlockBytes;
      auto* metadata = reinterpret_cast<uint32_t*>(data);
      auto* values = reinterpret_cast<uint16_t*>(data + kHeaderBytes);
      std::memset(metadata, 0, kHeaderBytes);
      for (int m = 0; m < 2; ++m)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < 8; i += 2) {
            const int row = operand_row(lane, i), group = pair_group(lane, i),
                      col = pair_group_col(m, group);
            unsigned kept = 0;
            for (int c = 0; c < 4; ++c)
              kept |= static_cast<unsigned>(reader.keeps({row, col + c})) << c;
            check(__builtin_popcount(kept) <= 2, "row ", reader.row(row), ", columns ",
                  block * kBlockCols + col, " to ", block * kBlockCols + col + 3, " keep ",
                  __builtin_popcount(kept), " weights; this packing holds two of four");
            const Choice choice = choose(kept);
            uint16_t* pair = values + (m * kLanes + lane) * 8 + i;
            pair[0] = choice.has_first ? reader.value({row, col + choice.first}) : kFiller;
            pair[1] = choice.has_second ? reader.value({row, col + choice.second}) : kFiller;
            metadata[pair_meta_lane(m, row, group)] |=
                static_cast<uint32_t>(choice.first | choice.second << 2)
                << pair_meta_bit(row, group);
          }
    }
  });
}

int64_t pair_unpack(const uint8_t* stream, int64_t rows, int64_t cols, uint16_t* target,
                    uint8_t* bitmask, int64_t* row_offsets) {
  const int64_t blocks = ceil_div(cols, kBlockCols);
  return unpack_strips(rows, cols, target, bitmask, row_offsets,
                       [&](int64_t strip, int64_t block, StripWriter& writer) {
                         const uint8_t* data = stream + (strip * blocks + block) * kPairBlockBytes;
                         const auto* metadata = reinterpret_cast<const uint32_t*>(data);
                         const auto* values =
                             reinterpret_cast<const uint16_t*>(data + kHeaderBytes);
                         for (int m = 0; m < 2; ++m)
                           for (int lane = 0; lane < kLanes; ++lane)
                             for (int i = 0; i < 8; ++i) {
                               const int row = operand_row(lane, i), group = pair_group(lane, i);
                               const uint32_t code = metadata[pair_meta_lane(m, row, group)] >>
                                                     pair_meta_bit(row, group);
                               const int col = pair_group_col(m, group) +
                                               static_cast<int>(code >> (2 * (i % 2)) & 3u);
                               const uint16_t value = values[(m * kLanes + lane) * 8 + i];
                               if (value != kFiller) writer.put({row, col}, value);
                             }
                       });
}

}  // namespace pysparse
