#pragma once
// The index fields of a step of an int8 n:m weight as bytes: each weight's place in its block.
// Include simd/nm_pattern.h first, then this inside the target region.

namespace pysparse {
namespace {

// Each group of 8 lanes takes its kBits bytes of fields into one quadword; a shift by any number of
// bits then lands each field in its lane.
template <class P>
struct ByteSpread {
  alignas(64) uint8_t gather[64] = {}, shift[64] = {}, start[64] = {};

  constexpr ByteSpread() {
    for (int i = 0; i < 64; ++i) {
      gather[i] = static_cast<uint8_t>(i / 8 * P::kBits + (i % 8 < P::kBits ? i % 8 : 0));
      shift[i] = static_cast<uint8_t>(i % 8 * P::kBits);
      start[i] = static_cast<uint8_t>(P::group_start(i));
    }
  }
};

template <class P>
inline __m512i decode_bytes(const uint8_t* indices) {
  static constexpr ByteSpread<P> spread;
  const __m512i bytes =
      _mm512_permutexvar_epi8(_mm512_load_si512(spread.gather), _mm512_loadu_si512(indices));
  const __m512i fields = _mm512_multishift_epi64_epi8(_mm512_load_si512(spread.shift), bytes);
  return _mm512_ternarylogic_epi32(fields, _mm512_set1_epi8(P::kMask),
                                   _mm512_load_si512(spread.start), 0xea);  // (a & b) | c
}

}  // namespace
}  // namespace pysparse
