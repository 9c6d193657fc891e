// Writes an int8 tile's 16 rows densely: zeros first, then each stored value times its scale,
// rounded once.
#include <algorithm>

#include "isa/generic.h"
#include "pysparse/int8.h"

namespace pysparse {
namespace {

template <class T>
void run(const TiledInt8View& weight, int64_t tile, int64_t rows, void* dense) {
  const RowScales& scales = weight.scales;
  const int8_t* next = weight.values + weight.tile_offsets[tile];
  T* out = static_cast<T*>(dense);
  std::fill(out, out + rows * weight.cols, T{});
  for (int64_t q = 0; q < weight.quads(); ++q) {
    for (uint64_t bits = weight.masks[tile * weight.quads() + q]; bits; bits &= bits - 1) {
      const int bit = __builtin_ctzll(bits);
      const int64_t row = bit / kQuadCols, col = kQuadCols * q + bit % kQuadCols;
      const float value = static_cast<float>(*next++);
      if (row < rows)
        assign(out[row * weight.cols + col],
               value * scales.scale_of(col / scales.group_cols, tile)[row]);
    }
  }
}

constexpr Int8BitmapUnpack::Kernel kFloat32{1, run<float>};
constexpr Int8BitmapUnpack::Kernel kBFloat16{1, run<BFloat16>};
const Register<Int8BitmapUnpack> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                                 {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace

const Int8BitmapUnpack::Kernel& int8_unpack_generic(DType dtype) {
  return dtype == DType::kFloat32 ? kFloat32 : kBFloat16;
}

}  // namespace pysparse
