// How fast this machine's cores multiply: chains of fused multiply-adds that never wait for memory, for
// the share of the peak that a kernel reaches. peak_probe.py compiles it for the CPU at hand.
#include <immintrin.h>

#include <cstdint>

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
// Two units with a latency of four cycles (six for the bf16 dot) need twelve chains in flight.
constexpr int kChains = 12;

typedef float Vector __attribute__((vector_size(4 * kLanes)));

// Keeps a value in a register that the compiler knows nothing about, so that no chain is folded.
template <class T>
void hide(T& value) {
  __asm__ volatile("" : "+x"(value));
}

}  // namespace

extern "C" {

// Returns the floating-point operations done.
int64_t peak_fp32(int64_t rounds) {
  Vector sums[kChains] = {}, factor = {};
  hide(factor);
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sums[c] = sums[c] * factor + factor;
      hide(sums[c]);
    }
  return rounds * kChains * kLanes * 2;
}

// 0 where the CPU has no bf16 dot product.
int64_t peak_bf16(int64_t rounds) {
#if defined(__AVX512BF16__)
  __m512 sums[kChains] = {};
  __m512i factor = {};
  hide(factor);
  for (int64_t i = 0; i < rounds; ++i)
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) {
      sums[c] = _mm512_dpbf16_ps(sums[c], (__m512bh)factor, (__m512bh)factor);
      hide(sums[c]);
    }
  return rounds * kChains * 64;
#else
  return rounds - rounds;
#endif
}
}
