#pragma once
// The activations of a call, laid out as the kernels want them, packed by all threads together.
#include <algorithm>
#include <type_traits>

#include "pysparse/dtype.h"
#include "pysparse/linear.h"
#include "pysparse/parallel.h"
#include "pysparse/scratch.h"

namespace pysparse {

template <class In, class Out>
void widen(const In* source, int64_t count, Out* target) {
  if constexpr (std::is_same_v<In, Out>) {
    std::copy(source, source + count, target);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i] = to_float(source[i]);
  }
}

// packed[block][token][lane] = x[token][block * lanes + lane], zero past the last column.
template <class In, class Out>
void pack_blocks(const In* x, int64_t cols, int tokens, int64_t lanes, Range blocks, Out* packed) {
  const int64_t whole = std::min(blocks.end, cols / lanes);
  for (int t = 0; t < tokens; ++t) {
    const In* source = x + t * cols;
    Out* target = packed + t * lanes;
    if (tokens == 1) {
      widen(source + blocks.begin * lanes, std::max<int64_t>(0, whole - blocks.begin) * lanes,
            target + blocks.begin * lanes);
    } else {
      for (int64_t b = blocks.begin; b < whole; ++b) {
        if (lanes == 2)
          widen(source + 2 * b, 2, target + 2 * b * tokens);  // a constant count inlines
        else
          widen(source + b * lanes, lanes, target + b * tokens * lanes);
      }
    }
    if (whole < blocks.end) {  // this share holds the ragged last block
      Out* last = target + whole * tokens * lanes;
      std::fill(last, last + lanes, Out{});
      widen(source + whole * lanes, cols - whole * lanes, last);
    }
  }
}

// The activations of one call: chunks of at most kernel.max_tokens tokens, each in the kernel's
// layout.
struct Input {
  InputLayout layout;
  DType dtype;  // of x
  const void* x;
  int64_t tokens, cols;
  int chunk;  // tokens in each chunk but the last
  void* packed = nullptr;

  int64_t blocks() const { return (cols + layout.lanes - 1) / layout.lanes; }
  int64_t chunks() const { return (tokens + chunk - 1) / chunk; }
  int64_t chunk_bytes() const { return blocks() * layout.lanes * chunk * size_of(layout.dtype); }
  int64_t first_token(int64_t c) const { return c * chunk; }
  int tokens_in(int64_t c) const {
    return static_cast<int>(std::min<int64_t>(chunk, tokens - c * chunk));
  }
  // One token of the right type, without a ragged block, already lies as the kernel wants it.
  bool is_direct() const {
    return tokens == 1 && cols % layout.lanes == 0 && layout.dtype == dtype;
  }
  const void* chunk_data(int64_t c) const {
    return packed ? static_cast<const char*>(packed) + c * chunk_bytes() : x;
  }

  void pack_share(int thread, int threads) const {
    const Range share = even_share(blocks(), thread, threads);
    for (int64_t c = 0; c < chunks(); ++c) {
      char* target = static_cast<char*>(packed) + c * chunk_bytes();
      const char* source = static_cast<const char*>(x) + c * chunk * cols * size_of(dtype);
      if (dtype == DType::kFloat32)
        pack<float, float>(source, c, share, target);
      else if (layout.dtype == DType::kBFloat16)
        pack<BFloat16, BFloat16>(source, c, share, target);
      else
        pack<BFloat16, float>(source, c, share, target);
    }
  }

 private:
  template <class In, class Out>
  void pack(const void* source, int64_t c, Range share, void* target) const {
    pack_blocks(static_cast<const In*>(source), cols, tokens_in(c), layout.lanes, share,
                static_cast<Out*>(target));
  }
};

// Runs body(thread, threads) on `threads` threads once every thread can read the whole packed
// input.
template <class Body>
void with_input(Input& input, int threads, const Body& body) {
  static thread_local Scratch scratch;
  if (!input.is_direct()) input.packed = scratch.reserve(input.chunks() * input.chunk_bytes());
  parallel(threads, [&](int thread, int team) {
    if (input.packed) {
      input.pack_share(thread, team);
      team_barrier(team);
    }
    body(thread, team);
  });
}

template <class Kernel>
Input input_for(const Kernel& kernel, DType dtype, const void* x, int64_t tokens, int64_t cols) {
  const int64_t chunk = std::min<int64_t>(kernel.max_tokens, std::max<int64_t>(1, tokens));
  return {kernel.input, dtype, x, tokens, cols, static_cast<int>(chunk)};
}

}  // namespace pysparse
