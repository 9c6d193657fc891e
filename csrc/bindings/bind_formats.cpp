#include "bind.h"
#include "pysparse/device_formats.h"
#include "pysparse/device_layout.h"
#include "pysparse/error.h"
#include "pysparse/formats.h"

namespace pysparse {
namespace {

BitmapView view(int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets) {
  return {pointer<const uint8_t>(bitmask), pointer<const int64_t>(row_offsets), rows, cols};
}

TiledBitmapView tiled_view(uintptr_t values, int64_t word, int64_t rows, int64_t cols,
                           uintptr_t masks, uintptr_t tile_offsets) {
  check(word == 2 || word == 4, "values have 2 or 4 bytes, got ", word);
  return {pointer<const void>(values),
          pointer<const uint32_t>(masks),
          pointer<const int64_t>(tile_offsets),
          rows,
          cols,
          word == 4 ? DType::kFloat32 : DType::kBFloat16};
}

PairsView pairs_view(uintptr_t values, int64_t word, int64_t rows, int64_t cols, uintptr_t indices,
                     uintptr_t row_order, uintptr_t counts, uintptr_t block_offsets) {
  check(word == 2 || word == 4, "values have 2 or 4 bytes, got ", word);
  return {pointer<const void>(values),
          pointer<const uint8_t>(indices),
          pointer<const uint8_t>(row_order),
          pointer<const uint8_t>(counts),
          pointer<const int64_t>(block_offsets),
          rows,
          cols,
          word == 4 ? DType::kFloat32 : DType::kBFloat16};
}

void bind_pairs(pybind11::module_& module) {
  module.def(
      "pairs_plan",
      [](uintptr_t tiled, int64_t word, int64_t rows, int64_t cols, uintptr_t masks,
         uintptr_t tile_offsets, int64_t nnz, uintptr_t row_order, uintptr_t counts,
         uintptr_t block_offsets) {
        return pairs_plan(tiled_view(tiled, word, rows, cols, masks, tile_offsets), nnz,
                          pointer<uint8_t>(row_order), pointer<uint8_t>(counts),
                          pointer<int64_t>(block_offsets));
      },
      ReleaseGil());
  module.def(
      "pairs_fill",
      [](uintptr_t tiled, int64_t word, int64_t rows, int64_t cols, uintptr_t masks,
         uintptr_t tile_offsets, uintptr_t row_order, uintptr_t counts, uintptr_t block_offsets,
         uintptr_t values, uintptr_t indices) {
        pairs_fill(tiled_view(tiled, word, rows, cols, masks, tile_offsets),
                   pairs_view(0, word, rows, cols, 0, row_order, counts, block_offsets),
                   pointer<void>(values), pointer<uint8_t>(indices));
      },
      ReleaseGil());
  module.def(
      "pairs_mask",
      [](uintptr_t values, int64_t word, int64_t rows, int64_t cols, uintptr_t indices,
         uintptr_t row_order, uintptr_t counts, uintptr_t block_offsets, uintptr_t bitmask,
         uintptr_t row_offsets) {
        return pairs_mask(
            pairs_view(values, word, rows, cols, indices, row_order, counts, block_offsets),
            pointer<uint8_t>(bitmask), pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.def(
      "pairs_values",
      [](uintptr_t values, int64_t word, int64_t rows, int64_t cols, uintptr_t indices,
         uintptr_t row_order, uintptr_t counts, uintptr_t block_offsets, uintptr_t row_offsets,
         uintptr_t target) {
        pairs_values(
            pairs_view(values, word, rows, cols, indices, row_order, counts, block_offsets),
            pointer<const int64_t>(row_offsets), pointer<void>(target));
      },
      ReleaseGil());
}

}  // namespace

void bind_formats(pybind11::module_& module) {
  module.def(
      "bitmap_pack_mask",
      [](uintptr_t keep, int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets) {
        return bitmap_pack_mask(pointer<const uint8_t>(keep), rows, cols, pointer<uint8_t>(bitmask),
                                pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.def(
      "bitmap_validate",
      [](uintptr_t bitmask, int64_t rows, int64_t cols, uintptr_t row_offsets, int64_t nnz) {
        bitmap_validate(view(rows, cols, bitmask, row_offsets), nnz);
      },
      ReleaseGil());
  module.def(
      "bitmap_gather",
      [](uintptr_t dense, int64_t word, int64_t rows, int64_t cols, uintptr_t bitmask,
         uintptr_t row_offsets, uintptr_t values, int64_t nnz) {
        bitmap_gather(pointer<const void>(dense), word, view(rows, cols, bitmask, row_offsets),
                      pointer<void>(values), nnz);
      },
      ReleaseGil());
  module.def(
      "bitmap_scatter",
      [](uintptr_t values, int64_t word, int64_t rows, int64_t cols, uintptr_t bitmask,
         uintptr_t row_offsets, int64_t nnz, uintptr_t dense) {
        bitmap_scatter(pointer<const void>(values), word, view(rows, cols, bitmask, row_offsets),
                       nnz, pointer<void>(dense));
      },
      ReleaseGil());
  module.def(
      "tile_pack",
      [](uintptr_t values, int64_t word, int64_t rows, int64_t cols, uintptr_t bitmask,
         uintptr_t row_offsets, int64_t nnz, uintptr_t tiled, uintptr_t masks,
         uintptr_t tile_offsets) {
        tile_pack(pointer<const void>(values), word, view(rows, cols, bitmask, row_offsets), nnz,
                  pointer<void>(tiled), pointer<uint32_t>(masks), pointer<int64_t>(tile_offsets));
      },
      ReleaseGil());
  module.def(
      "tile_unpack",
      [](uintptr_t tiled, int64_t word, int64_t rows, int64_t cols, uintptr_t masks,
         uintptr_t tile_offsets, int64_t nnz, uintptr_t values, uintptr_t bitmask,
         uintptr_t row_offsets) {
        tile_unpack(pointer<const void>(tiled), word, rows, cols, pointer<const uint32_t>(masks),
                    pointer<const int64_t>(tile_offsets), nnz, pointer<void>(values),
                    pointer<uint8_t>(bitmask), pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.def(
      "csr_indices",
      [](uintptr_t bitmask, int64_t rows, int64_t cols, uintptr_t row_offsets, int64_t nnz,
         uintptr_t col_indices) {
        csr_indices(view(rows, cols, bitmask, row_offsets), nnz, pointer<int32_t>(col_indices));
      },
      ReleaseGil());
  bind_pairs(module);
}

void bind_device_formats(pybind11::module_& module) {
  module.def(
      "delta_count",
      [](uintptr_t bitmask, int64_t rows, int64_t cols, uintptr_t row_offsets, int64_t nnz,
         uintptr_t row_groups) {
        return delta_count(view(rows, cols, bitmask, row_offsets), nnz,
                           pointer<int32_t>(row_groups));
      },
      ReleaseGil());
  module.def("delta_chunk_slots", layout::chunk_slots);
  module.def(
      "delta_pack",
      [](uintptr_t source, int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets,
         uintptr_t row_groups, uintptr_t values, uintptr_t deltas, uintptr_t chunk_cols) {
        delta_pack(pointer<const uint16_t>(source), view(rows, cols, bitmask, row_offsets),
                   pointer<const int32_t>(row_groups), pointer<uint16_t>(values),
                   pointer<uint32_t>(deltas), pointer<int32_t>(chunk_cols));
      },
      ReleaseGil());
  module.def(
      "delta_unpack",
      [](uintptr_t values, uintptr_t deltas, uintptr_t row_groups, int64_t rows, int64_t cols,
         uintptr_t target, uintptr_t bitmask, uintptr_t row_offsets) {
        return delta_unpack(pointer<const uint16_t>(values), pointer<const uint32_t>(deltas),
                            pointer<const int32_t>(row_groups), rows, cols,
                            pointer<uint16_t>(target), pointer<uint8_t>(bitmask),
                            pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.def(
      "fragment_count",
      [](uintptr_t bitmask, int64_t rows, int64_t cols, uintptr_t row_offsets, int64_t nnz,
         uintptr_t offsets) {
        return fragment_count(view(rows, cols, bitmask, row_offsets), nnz,
                              pointer<int32_t>(offsets));
      },
      ReleaseGil());
  module.def(
      "fragment_pack",
      [](uintptr_t source, int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets,
         uintptr_t offsets, uintptr_t stream) {
        fragment_pack(pointer<const uint16_t>(source), view(rows, cols, bitmask, row_offsets),
                      pointer<const int32_t>(offsets), pointer<uint8_t>(stream));
      },
      ReleaseGil());
  module.def(
      "fragment_unpack",
      [](uintptr_t stream, uintptr_t offsets, int64_t rows, int64_t cols, uintptr_t target,
         uintptr_t bitmask, uintptr_t row_offsets) {
        return fragment_unpack(pointer<const uint8_t>(stream), pointer<const int32_t>(offsets),
                               rows, cols, pointer<uint16_t>(target), pointer<uint8_t>(bitmask),
                               pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.attr("PAIR_BLOCK_BYTES") = layout::kPairBlockBytes;
  module.def(
      "pair_pack",
      [](uintptr_t source, int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets,
         int64_t nnz, uintptr_t stream) {
        pair_pack(pointer<const uint16_t>(source), view(rows, cols, bitmask, row_offsets), nnz,
                  pointer<uint8_t>(stream));
      },
      ReleaseGil());
  module.def(
      "pair_unpack",
      [](uintptr_t stream, int64_t rows, int64_t cols, uintptr_t target, uintptr_t bitmask,
         uintptr_t row_offsets) {
        return pair_unpack(pointer<const uint8_t>(stream), rows, cols, pointer<uint16_t>(target),
                           pointer<uint8_t>(bitmask), pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.def("nm_rows_vectors", nm_rows_vectors);
  module.def(
      "nm_rows_pack",
      [](uintptr_t source, int64_t rows, int64_t cols, uintptr_t bitmask, uintptr_t row_offsets,
         int64_t nnz, int64_t n, int64_t m, uintptr_t values, uintptr_t places) {
        nm_rows_pack(pointer<const uint16_t>(source), view(rows, cols, bitmask, row_offsets), nnz,
                     n, m, pointer<uint16_t>(values), pointer<uint8_t>(places));
      },
      ReleaseGil());
  module.def(
      "nm_rows_unpack",
      [](uintptr_t values, uintptr_t places, int64_t n, int64_t m, int64_t rows, int64_t cols,
         uintptr_t target, uintptr_t bitmask, uintptr_t row_offsets) {
        return nm_rows_unpack(pointer<const uint16_t>(values), pointer<const uint8_t>(places), n, m,
                              rows, cols, pointer<uint16_t>(target), pointer<uint8_t>(bitmask),
                              pointer<int64_t>(row_offsets));
      },
      ReleaseGil());
  module.def("nm_rows_group", [](int n, int bits, int cols, int vector, int entry) {
    return layout::nm_rows(n, bits, cols).group(vector, entry);
  });
  module.def("nm_rows_entry", [](int n, int bits, int cols, int group, int rank) {
    const layout::NmRows rows = layout::nm_rows(n, bits, cols);
    return pybind11::make_tuple(rows.vector_of(group, rank), rows.entry_of(group));
  });
  module.def("fragment_place", [](int lane, int q, int i) {
    const layout::Place at = layout::fragment_place(lane, q, i);
    return pybind11::make_tuple(at.row, at.col);
  });
  module.def("pair_place", [](int m, int lane, int i, int position) {
    const int group = layout::pair_group(lane, i);
    return pybind11::make_tuple(layout::operand_row(lane, i),
                                layout::pair_group_col(m, group) + position);
  });
  module.def("input_word", [](bool pair, int w) {
    return pair ? layout::pair_input_word(w) : layout::fragment_input_word(w);
  });
}

}  // namespace pysparse
