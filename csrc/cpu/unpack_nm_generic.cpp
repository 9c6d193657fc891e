// Writes an N:M tile's 16 rows densely, of float and of int8 values: any pattern, slot by slot.
#include <cstring>

#include "isa/generic.h"
#include "pysparse/nm_slots.h"

namespace pysparse {
namespace {

template <class T>
void run(const NmView& weight, int64_t tile, int64_t rows, void* dense) {
  unpack_from<T>(weight, tile, rows, 0, static_cast<T*>(dense),
                 [](T value, int64_t, int64_t) { return value; });
}

template <class T>
void run_int8(const NmView& weight, const RowScales& scales, int64_t tile, int64_t rows,
              void* dense) {
  unpack_from<int8_t>(weight, tile, rows, 0, static_cast<T*>(dense),
                      [&](int8_t value, int64_t col, int64_t row) {
                        const float scale = scales.scale_of(col / scales.group_cols, tile)[row];
                        T rounded;
                        assign(rounded, static_cast<float>(value) * scale);
                        return rounded;
                      });
}

constexpr NmUnpack::Kernel kFloat32{covers_all, run<float>};
constexpr NmUnpack::Kernel kBFloat16{covers_all, run<BFloat16>};
const Register<NmUnpack> registered[] = {{DType::kFloat32, isa::kGeneric, kFloat32},
                                         {DType::kBFloat16, isa::kGeneric, kBFloat16}};
constexpr NmInt8Unpack::Kernel kInt8Float32{1, covers_all, run_int8<float>};
constexpr NmInt8Unpack::Kernel kInt8BFloat16{1, covers_all, run_int8<BFloat16>};
const Register<NmInt8Unpack> registered_int8[] = {{DType::kFloat32, isa::kGeneric, kInt8Float32},
                                                  {DType::kBFloat16, isa::kGeneric, kInt8BFloat16}};

}  // namespace

const NmUnpack::Kernel& nm_unpack_generic(DType dtype) {
  return dtype == DType::kFloat32 ? kFloat32 : kBFloat16;
}

const NmInt8Unpack::Kernel& nm_int8_unpack_generic(DType dtype) {
  return dtype == DType::kFloat32 ? kInt8Float32 : kInt8BFloat16;
}

}  // namespace pysparse
