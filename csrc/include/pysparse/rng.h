#pragma once
// Random numbers by counting: Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy
// as 1, 2, 3"). A draw depends on the seed and on what it is for, never on the order of the work,
// so threads, batches and devices agree bit for bit. Plain functions: CUDA compiles them as they
// are.
#include <cstdint>

#if defined(__CUDACC__)
#define PYSPARSE_EVERYWHERE __host__ __device__
#else
#define PYSPARSE_EVERYWHERE
#endif

namespace pysparse {

inline constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
inline constexpr uint32_t kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
inline constexpr int kPhiloxRounds = 10;

// The words of one block: x holds the counter and then the result.
PYSPARSE_EVERYWHERE inline void philox(uint64_t key, uint32_t x[4]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{x[0]} * 0xD2511F53u, p1 = uint64_t{x[2]} * 0xCD9E8D57u;
    x[0] = static_cast<uint32_t>(p1 >> 32) ^ x[1] ^ k0;
    x[2] = static_cast<uint32_t>(p0 >> 32) ^ x[3] ^ k1;
    x[1] = static_cast<uint32_t>(p1);
    x[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Who draws: the sample of the data set (or the unit of an estimator), how often it has been
// visited, and for what. Each has a sequence of 2^32 blocks of its own.
struct Stream {
  static constexpr uint64_t kSamples = uint64_t{1} << 40;
  static constexpr uint32_t kVisits = uint32_t{1} << 23;
  uint64_t key;      // the seed
  uint64_t sample;   // below kSamples
  uint32_t visit;    // below kVisits
  uint32_t purpose;  // 0: permutations; others are the caller's

  PYSPARSE_EVERYWHERE uint32_t low() const { return static_cast<uint32_t>(sample); }
  PYSPARSE_EVERYWHERE uint32_t high() const {
    return static_cast<uint32_t>(sample >> 32) | visit << 8;
  }
};

// Draws again for a step whose word was rejected: the top bit sets its counters apart.
PYSPARSE_EVERYWHERE inline uint32_t draw_again(const Stream& stream, uint32_t step,
                                               uint32_t range) {
  for (uint32_t attempt = 0;; ++attempt) {
    uint32_t x[4] = {stream.low(), stream.high() | 0x80000000u, stream.purpose,
                     step << 8 | attempt};
    philox(stream.key, x);
    const uint64_t wide = uint64_t{x[0]} * range;
    if (static_cast<uint32_t>(wide) >= (0u - range) % range)
      return static_cast<uint32_t>(wide >> 32);
  }
}

// Uniform below `range`, exactly: the word of the step, multiplied (Lemire 2019); of 2^32 words the
// 2^32 mod range that would be one too many are rejected.
PYSPARSE_EVERYWHERE inline uint32_t uniform_below(const Stream& stream, uint32_t word,
                                                  uint32_t step, uint32_t range) {
  const uint64_t wide = uint64_t{word} * range;
  if (static_cast<uint32_t>(wide) < (0u - range) % range) return draw_again(stream, step, range);
  return static_cast<uint32_t>(wide >> 32);
}

}  // namespace pysparse
