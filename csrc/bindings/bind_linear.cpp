#include "bind.h"
#include "pysparse/linear.h"

namespace pysparse {
namespace {

void call_bitmap_linear(int dtype, uintptr_t x, int64_t tokens, int64_t cols, uintptr_t values,
                        int64_t value_count, uintptr_t masks, int64_t mask_count,
                        uintptr_t tile_offsets, int64_t offset_count, uintptr_t bias, uintptr_t y,
                        int64_t rows) {
  const DType type = dtype_of(dtype);
  const TiledBitmapView weight{pointer<const void>(values),
                               pointer<const uint32_t>(masks),
                               pointer<const int64_t>(tile_offsets),
                               rows,
                               cols,
                               type};
  bitmap_linear(weight, {value_count, mask_count, offset_count}, pointer<const void>(x), tokens,
                {pointer<void>(y), pointer<const void>(bias), rows, type});
}

void call_bitmap_unpack(int dtype, uintptr_t values, int64_t value_count, uintptr_t masks,
                        int64_t tiles, uintptr_t tile_offsets, int64_t cols, int64_t first_tile,
                        int64_t rows, uintptr_t dense) {
  const TiledBitmapView weight{pointer<const void>(values),
                               pointer<const uint32_t>(masks),
                               pointer<const int64_t>(tile_offsets),
                               tiles * kTileRows,
                               cols,
                               dtype_of(dtype)};
  bitmap_unpack(weight, value_count, tiles, first_tile, rows, pointer<void>(dense));
}

void call_dense_linear(int dtype, uintptr_t x, int64_t tokens, int64_t cols, uintptr_t weight,
                       uintptr_t bias, uintptr_t y, int64_t rows) {
  const DType type = dtype_of(dtype);
  dense_linear({pointer<const void>(weight), rows, cols, type}, pointer<const void>(x), tokens,
               {pointer<void>(y), pointer<const void>(bias), rows, type});
}

void call_pairs_linear(int dtype, uintptr_t x, int64_t tokens, int64_t cols, uintptr_t values,
                       int64_t entries, uintptr_t indices, uintptr_t row_order, int64_t order_count,
                       uintptr_t counts, int64_t count_count, uintptr_t block_offsets,
                       int64_t offset_count, uintptr_t bias, uintptr_t y, int64_t rows) {
  const DType type = dtype_of(dtype);
  const PairsView weight{pointer<const void>(values),
                         pointer<const uint8_t>(indices),
                         pointer<const uint8_t>(row_order),
                         pointer<const uint8_t>(counts),
                         pointer<const int64_t>(block_offsets),
                         rows,
                         cols,
                         type};
  pairs_linear(weight, {entries, order_count, count_count, offset_count}, pointer<const void>(x),
               tokens, {pointer<void>(y), pointer<const void>(bias), rows, type});
}

}  // namespace

void bind_linear(pybind11::module_& module) {
  module.def("bitmap_linear", &call_bitmap_linear, ReleaseGil());
  module.def("bitmap_unpack", &call_bitmap_unpack, ReleaseGil());
  module.def("pairs_linear", &call_pairs_linear, ReleaseGil());
  module.def("dense_linear", &call_dense_linear, ReleaseGil());
}

}  // namespace pysparse
