#pragma once
// Value types of the kernels, and the scalar conversions that every kernel agrees on.
#include <cstdint>
#include <cstring>

namespace pysparse {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };
inline constexpr int kDTypes = 2;

constexpr const char* name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : "bfloat16";
}
constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void assign(float& target, float value) { target = value; }
// Round to nearest even, as torch does; a NaN stays a NaN instead of rounding up to infinity.
inline void assign(BFloat16& target, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  target.bits =
      is_nan ? 0x7fc0u : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace pysparse
