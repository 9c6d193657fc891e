#include "quantized_input.h"

namespace pysparse {

QuantizedInput::QuantizedInput(const void* x, DType dtype, int64_t tokens, int parts,
                               const BlockLayout& layout, QuantizeToken quantize, int max_vectors)
    : x_(x),
      dtype_(dtype),
      tokens_(tokens),
      parts_(parts),
      layout_(layout),
      quantize_(quantize),
      chunk_(std::clamp<int64_t>(tokens, 1, max_vectors / parts)) {
  static thread_local Scratch bytes, scales;
  bytes_ = static_cast<uint8_t*>(bytes.reserve(chunks() * chunk_ * parts * layout.size()));
  scales_ = static_cast<float*>(scales.reserve(tokens * sizeof(float)));
}

QuantizedTokens QuantizedInput::chunk(int64_t c) const {
  return {bytes_of(c), scales_ + c * chunk_, tokens_in(c), parts_};
}

void QuantizedInput::prepare(int thread, int threads) const {
  const Range share = even_share(tokens_, thread, threads);
  for (int64_t token = share.begin; token < share.end; ++token) prepare_token(token);
}

void QuantizedInput::prepare_token(int64_t token) const {
  constexpr auto kZero = static_cast<uint8_t>(kInputZero);
  const int64_t c = token / chunk_;
  const void* source = static_cast<const char*>(x_) + token * layout_.cols * size_of(dtype_);
  uint8_t* packed = bytes_of(c);
  if (tokens_in(c) * parts_ == 1 && layout_.keeps_order()) {
    scales_[token] = quantize_(source, layout_.cols, 1, packed, nullptr);
    std::fill(packed + layout_.cols, packed + layout_.size(), kZero);
    return;
  }
  static thread_local Scratch rows;
  auto* high = static_cast<uint8_t*>(rows.reserve(2 * layout_.cols));
  uint8_t* low = high + layout_.cols;
  scales_[token] = quantize_(source, layout_.cols, parts_, high, low);
  const int vectors = tokens_in(c) * parts_;
  const int first = static_cast<int>(token - c * chunk_) * parts_;
  place(high, layout_, vectors, first, kZero, packed);
  if (parts_ == 2) place(low, layout_, vectors, first + 1, kZero, packed);
}

}  // namespace pysparse
