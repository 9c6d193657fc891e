#pragma once
// Host packers between the row-major bitmap and the packings of device_layout.h. 16-bit values
// only. The sign of a stored zero is dropped, because -0.0 marks fillers.
#include "pysparse/views.h"

namespace pysparse {

// Groups of each row; row_groups [rows + 1] is their running sum. Validates the bitmap first.
int64_t delta_count(const BitmapView& map, int64_t nnz, int32_t* row_groups);
// values [8 * groups], deltas [groups], chunk_cols [chunk_slots].
void delta_pack(const uint16_t* source, const BitmapView& map, const int32_t* row_groups,
                uint16_t* values, uint32_t* deltas, int32_t* chunk_cols);
// Returns nnz; bitmask and row_offsets first (values null), then values.
int64_t delta_unpack(const uint16_t* values, const uint32_t* deltas, const int32_t* row_groups,
                     int64_t rows, int64_t cols, uint16_t* target, uint8_t* bitmask,
                     int64_t* row_offsets);

// offsets [strips * blocks + 1] in units of 16 bytes; returns the largest block in bytes.
int64_t fragment_count(const BitmapView& map, int64_t nnz, int32_t* offsets);
void fragment_pack(const uint16_t* source, const BitmapView& map, const int32_t* offsets,
                   uint8_t* stream);
int64_t fragment_unpack(const uint8_t* stream, const int32_t* offsets, int64_t rows, int64_t cols,
                        uint16_t* target, uint8_t* bitmask, int64_t* row_offsets);

// Throws, naming the place, when a group of four columns keeps more than two. stream:
// kPairBlockBytes a block.
void pair_pack(const uint16_t* source, const BitmapView& map, int64_t nnz, uint8_t* stream);
int64_t pair_unpack(const uint8_t* stream, int64_t rows, int64_t cols, uint16_t* target,
                    uint8_t* bitmask, int64_t* row_offsets);

// Vectors of 8 entries in a row of n:m groups; throws unless m is 4, 8 or 16 and 0 < n < m.
int64_t nm_rows_vectors(int64_t n, int64_t m, int64_t cols);
// values [rows * vectors * 8], places [rows * vectors * log2(m)] bytes. Throws, naming the place,
// when a group keeps more than n.
void nm_rows_pack(const uint16_t* source, const BitmapView& map, int64_t nnz, int64_t n, int64_t m,
                  uint16_t* values, uint8_t* places);
int64_t nm_rows_unpack(const uint16_t* values, const uint8_t* places, int64_t n, int64_t m,
                       int64_t rows, int64_t cols, uint16_t* target, uint8_t* bitmask,
                       int64_t* row_offsets);

}  // namespace pysparse
