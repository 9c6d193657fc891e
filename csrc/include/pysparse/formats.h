#pragma once
// Host packing: between dense, row-major bitmap, tiled bitmap and CSR. Values are moved as 2- or
// 4-byte words, so every bit pattern survives.
#include "pysparse/views.h"

namespace pysparse {

// Packs `keep` (one byte a weight) into bits and row offsets; returns the number of kept weights.
int64_t bitmap_pack_mask(const uint8_t* keep, int64_t rows, int64_t cols, uint8_t* bitmask,
                         int64_t* row_offsets);
// Throws, naming the first offence, unless bits, offsets and count agree. Reads nothing through an
// offset.
void bitmap_validate(const BitmapView& map, int64_t nnz);
void bitmap_gather(const void* dense, int64_t word, const BitmapView& map, void* values,
                   int64_t nnz);
void bitmap_scatter(const void* values, int64_t word, const BitmapView& map, int64_t nnz,
                    void* dense);
// Outputs: values[nnz], masks[tiles * pairs], tile_offsets[tiles + 1]. Validates first.
void tile_pack(const void* values, int64_t word, const BitmapView& map, int64_t nnz,
               void* tiled_values, uint32_t* masks, int64_t* tile_offsets);
void tile_unpack(const void* tiled_values, int64_t word, int64_t rows, int64_t cols,
                 const uint32_t* masks, const int64_t* tile_offsets, int64_t nnz, void* values,
                 uint8_t* bitmask, int64_t* row_offsets);
// Outputs: counts, row_order and block_offsets of a PairsView; returns the number of entries, for
// which pairs_fill then wants room. Validates the tiles.
int64_t pairs_plan(const TiledBitmapView& tiled, int64_t nnz, uint8_t* row_order, uint8_t* counts,
                   int64_t* block_offsets);
void pairs_fill(const TiledBitmapView& tiled, const PairsView& plan, void* values,
                uint8_t* indices);
// Outputs: bitmask and row_offsets; returns the number of values, which pairs_values then writes.
int64_t pairs_mask(const PairsView& pairs, uint8_t* bitmask, int64_t* row_offsets);
void pairs_values(const PairsView& pairs, const int64_t* row_offsets, void* values);
void csr_indices(const BitmapView& map, int64_t nnz, int32_t* col_indices);

}  // namespace pysparse
