#pragma once
// The activations of one call, quantised token by token and laid out in chunks for the kernels.
#include "block_layout.h"
#include "pysparse/int8.h"
#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {

class QuantizedInput {
 public:
  // Memory is the calling thread's and serves until its next call.
  QuantizedInput(const void* x, DType dtype, int64_t tokens, int parts, const BlockLayout& layout,
                 QuantizeToken quantize, int max_vectors);

  int64_t chunks() const { return (tokens_ + chunk_ - 1) / chunk_; }
  int64_t first_token(int64_t c) const { return c * chunk_; }
  int tokens_in(int64_t c) const {
    return static_cast<int>(std::min(chunk_, tokens_ - c * chunk_));
  }
  QuantizedTokens chunk(int64_t c) const;
  // Quantises this thread's share of the tokens.
  void prepare(int thread, int threads) const;

 private:
  uint8_t* bytes_of(int64_t c) const { return bytes_ + c * chunk_ * parts_ * layout_.size(); }
  void prepare_token(int64_t token) const;

  const void* x_;
  DType dtype_;
  int64_t tokens_;
  int parts_;
  BlockLayout layout_;
  QuantizeToken quantize_;
  int64_t chunk_;  // tokens in each chunk but the last
  uint8_t* bytes_;
  float* scales_;
};

// Runs body(thread, threads) on `threads` threads once every thread can read the whole input.
template <class Input, class Body>
void with_prepared(const Input& input, int threads, const Body& body) {
  parallel(threads, [&](int thread, int team) {
    input.prepare(thread, team);
    team_barrier(team);
    body(thread, team);
  });
}

}  // namespace pysparse
