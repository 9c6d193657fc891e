#pragma once
// Quantises one token, in loops plain enough for the compiler to vectorise at the level of the
// including file. Include every system header and pysparse/int8.h first, then this inside the
// target region.

namespace pysparse {
namespace {

inline uint32_t magnitude_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffu;
}

// Rounds to nearest, ties to even. A NaN or an infinity anywhere makes the scale NaN and with it
// every output of the token; a token of zeros, or one too small to invert, gets scale 0.
template <class T>
float quantize_token(const void* x, int64_t cols, int parts, uint8_t* high, uint8_t* low) {
  const T* source = static_cast<const T*>(x);
  int32_t largest_bits = 0;  // magnitudes are ordered like their bits, NaN above infinity
  for (int64_t i = 0; i < cols; ++i)
    largest_bits =
        std::max(largest_bits, static_cast<int32_t>(magnitude_bits(to_float(source[i]))));
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  const float levels = parts == 1 ? 127.0f : 32512.0f;  // 127 * 256, so that |high| <= 127
  const float inverse = levels / largest;
  const bool usable = std::isfinite(largest) && std::isfinite(inverse);
  if (!usable) {
    std::fill(high, high + cols, static_cast<uint8_t>(kInputZero));
    if (parts == 2) std::fill(low, low + cols, static_cast<uint8_t>(kInputZero));
    return std::isfinite(largest) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  if (parts == 1) {
    for (int64_t i = 0; i < cols; ++i)
      high[i] = static_cast<uint8_t>(
          static_cast<int>(std::nearbyint(to_float(source[i]) * inverse)) + kInputZero);
  } else {
    for (int64_t i = 0; i < cols; ++i) {
      const int q = static_cast<int>(std::nearbyint(to_float(source[i]) * inverse));
      const int upper = (q + 128) >> 8;
      high[i] = static_cast<uint8_t>(upper + kInputZero);
      low[i] = static_cast<uint8_t>(q - 256 * upper + kInputZero);
    }
  }
  return largest / levels;
}

}  // namespace
}  // namespace pysparse
