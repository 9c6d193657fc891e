// Writes a tile's 16 rows densely: zeros first, then each stored value at its place.
#include <algorithm>

#include "isa/generic.h"
#include "pysparse/linear.h"

namespace pysparse {
namespace {

template <class T>
void run(const TiledBitmapView& weight, int64_t tile, int64_t rows, void* dense) {
  const T* next = static_cast<const T*>(weight.values) + weight.tile_offsets[tile];
  const uint32_t* masks = weight.masks + tile * weight.pairs();
  T* out = static_cast<T*>(dense);
  std::fill(out, out + rows * weight.cols, T{});
  for (int64_t p = 0; p < weight.pairs(); ++p)
    for (uint32_t bits = masks[p]; bits; bits &= bits - 1) {
      const int bit = __builtin_ctz(bits);
      const T value = *next++;
      if (bit / 2 < rows) out[bit / 2 * weight.cols + 2 * p + bit % 2] = value;
    }
}

constexpr BitmapUnpack::Kernel kFloat32{run<float>};
constexpr BitmapUnpack::Kernel kBFloat16{run<BFloat16>};
const Register<BitmapUnpack> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                             {DType::kBFloat16, isa::kGeneric, kBFloat16}};

}  // namespace
}  // namespace pysparse
