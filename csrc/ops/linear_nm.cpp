// Linear layers with N:M weights: check, lay out the activations in the kernel's blocks, split the
// tiles. Zeros are not multiplied here, so an input that is not finite takes the generic kernel,
// which writes the zeros out and spreads it exactly as the dense product does.
#include <atomic>
#include <cmath>

#include "block_layout.h"
#include "pysparse/error.h"
#include "pysparse/nm_slots.h"
#include "pysparse/share.h"
#include "quantized_input.h"

namespace pysparse {
namespace {

BlockLayout blocks_of(const NmLayout& layout) {
  return {layout.cols,    layout.groups() * layout.m, layout.block_cols(), layout.blocks(),
          layout.per_row, layout.tail_steps()};
}

template <class In, class Out>
const Out* converted(const In* source, int64_t count, Out* buffer) {
  if constexpr (std::is_same_v<In, Out>) {
    return source;
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = to_float(source[i]);
    return buffer;
  }
}

// The activations of one call in chunks of at most max_tokens, each in the kernel's blocks.
class BlockedInput {
 public:
  BlockedInput(const void* x, DType dtype, DType wanted, int64_t tokens, const BlockLayout& layout,
               int max_tokens)
      : x_(x),
        dtype_(dtype),
        wanted_(wanted),
        tokens_(tokens),
        layout_(layout),
        chunk_(std::clamp<int64_t>(tokens, 1, max_tokens)) {
    static thread_local Scratch scratch;
    packed_ = static_cast<char*>(scratch.reserve(chunks() * chunk_bytes()));
  }

  int64_t chunks() const { return (tokens_ + chunk_ - 1) / chunk_; }
  int64_t first_token(int64_t c) const { return c * chunk_; }
  int tokens_in(int64_t c) const {
    return static_cast<int>(std::min(chunk_, tokens_ - c * chunk_));
  }
  const void* data(int64_t c) const { return packed_ + c * chunk_bytes(); }
  bool all_finite() const { return all_finite_.load(std::memory_order_relaxed); }

  void prepare(int thread, int threads) const {
    const Range share = even_share(tokens_, thread, threads);
    for (int64_t token = share.begin; token < share.end; ++token) {
      if (dtype_ == DType::kFloat32)
        place_token<float, float>(token);
      else if (wanted_ == DType::kBFloat16)
        place_token<BFloat16, BFloat16>(token);
      else
        place_token<BFloat16, float>(token);
    }
  }

 private:
  int64_t chunk_bytes() const { return chunk_ * layout_.size() * size_of(wanted_); }

  template <class In, class Out>
  void place_token(int64_t token) const {
    static thread_local Scratch buffer;
    const In* source = static_cast<const In*>(x_) + token * layout_.cols;
    int finite = 1;
    for (int64_t i = 0; i < layout_.cols; ++i) finite &= std::isfinite(to_float(source[i])) ? 1 : 0;
    if (!finite) all_finite_.store(false, std::memory_order_relaxed);
    const Out* row = converted(source, layout_.cols,
                               static_cast<Out*>(buffer.reserve(layout_.cols * sizeof(Out))));
    const int64_t c = token / chunk_;
    place(row, layout_, tokens_in(c), static_cast<int>(token - c * chunk_), Out{},
          reinterpret_cast<Out*>(packed_ + c * chunk_bytes()));
  }

  const void* x_;
  DType dtype_, wanted_;
  int64_t tokens_;
  BlockLayout layout_;
  int64_t chunk_;
  char* packed_;
  mutable std::atomic<bool> all_finite_{true};
};

void check_sizes(const NmView& weight, const NmSizes& sizes) {
  nm_check_layout(weight.layout);
  const int64_t values = weight.layout.tiles() * weight.layout.tile_values();
  const int64_t indices = weight.layout.tiles() * weight.layout.tile_bytes() + kIndexPadding;
  check(sizes.values == values && sizes.indices == indices, "values and indices hold ",
        sizes.values, " and ", sizes.indices, " entries, a ", weight.layout.n, ":", weight.layout.m,
        " weight of shape ", weight.layout.rows, " x ", weight.layout.cols, " has ", values,
        " and ", indices);
}

void check_groups(const NmLayout& layout, const RowScales& scales) {
  check(scales.groups == 1 || scales.group_cols % layout.block_cols() == 0, "group of ",
        scales.group_cols, " columns: for ", layout.n, ":", layout.m, " it must be a multiple of ",
        layout.block_cols());
}

template <class Op>
const typename Op::Kernel& kernel_for(const NmLayout& layout, DType dtype,
                                      const typename Op::Kernel& otherwise) {
  const auto& best = lookup<Op>(dtype);
  return best.covers(layout.n, layout.m) ? best : otherwise;
}

int64_t bytes_of_tile(const NmLayout& layout, int64_t word) {
  return layout.tile_values() * word + layout.tile_bytes();
}

// Calls body(tile, rows, where they go) for each tile of a range of rows.
template <class Body>
void for_tiles(const NmLayout& layout, int64_t first_tile, int64_t rows, DType dtype, void* dense,
               const Body& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  check(first_tile >= 0 && rows >= 0 && first_tile + tiles <= layout.tiles(), "tiles [", first_tile,
        ", +", tiles, ") of a weight with ", layout.tiles());
  const int64_t tile_bytes = kTileRows * layout.cols * size_of(dtype);
  parallel_for(tiles, tiles * tile_bytes, [&](int64_t i) {
    body(first_tile + i, std::min(kTileRows, rows - i * kTileRows),
         static_cast<char*>(dense) + i * tile_bytes);
  });
}

}  // namespace

void nm_linear(const NmView& weight, const NmSizes& sizes, const void* x, int64_t tokens,
               const OutputView& output) {
  check_sizes(weight, sizes);
  const auto& kernel = kernel_for<NmLinear>(weight.layout, output.dtype, nm_generic(output.dtype));
  const BlockedInput input(x, output.dtype, kernel.input, tokens, blocks_of(weight.layout),
                           kernel.max_tokens);
  const int64_t tiles = weight.layout.tiles();
  const int64_t bytes = tiles * bytes_of_tile(weight.layout, size_of(output.dtype));
  with_prepared(input, threads_for(bytes * input.chunks()), [&](int thread, int threads) {
    const Range share = even_share(tiles, thread, threads);
    for (int64_t tile = share.begin; tile < share.end; ++tile) {
      if (!input.all_finite()) {
        nm_run_as_dense(weight, tile, x, tokens, output);
        continue;
      }
      for (int64_t c = 0; c < input.chunks(); ++c)  // the tile's weights stay in cache
        kernel.run(weight, tile, input.data(c), input.tokens_in(c), output, input.first_token(c));
    }
  });
}

void nm_int8_linear(const NmView& weight, const NmSizes& sizes, const RowScales& scales,
                    int64_t scale_count, int64_t sum_count, const void* x, int64_t tokens,
                    int parts, const OutputView& output) {
  check_sizes(weight, sizes);
  check_scales(scales, weight.layout.cols, weight.layout.tiles(), scale_count, sum_count);
  check_groups(weight.layout, scales);
  check(parts == 1 || parts == 2, "activations have 1 or 2 bytes, got ", parts);
  const auto& kernel =
      kernel_for<NmInt8Linear>(weight.layout, output.dtype, nm_int8_generic(output.dtype));
  const QuantizedInput input(x, output.dtype, tokens, parts, blocks_of(weight.layout),
                             kernel.quantize, kernel.max_vectors);
  const int64_t tiles = weight.layout.tiles();
  const int64_t bytes = tiles * bytes_of_tile(weight.layout, 1);
  with_prepared(input, threads_for(bytes * input.chunks()), [&](int thread, int threads) {
    const Range share = even_share(tiles, thread, threads);
    for (int64_t tile = share.begin; tile < share.end; ++tile)
      for (int64_t c = 0; c < input.chunks(); ++c)
        kernel.run(weight, scales, tile, input.chunk(c), output, input.first_token(c));
  });
}

void nm_unpack(const NmView& weight, const NmSizes& sizes, int64_t first_tile, int64_t rows,
               DType dtype, void* dense) {
  check_sizes(weight, sizes);
  const auto& kernel = kernel_for<NmUnpack>(weight.layout, dtype, nm_unpack_generic(dtype));
  for_tiles(
      weight.layout, first_tile, rows, dtype, dense,
      [&](int64_t tile, int64_t count, void* target) { kernel.run(weight, tile, count, target); });
}

void nm_int8_unpack(const NmView& weight, const NmSizes& sizes, const RowScales& scales,
                    int64_t first_tile, int64_t rows, DType dtype, void* dense) {
  check_sizes(weight, sizes);
  check_groups(weight.layout, scales);
  const auto& generic = nm_int8_unpack_generic(dtype);
  const auto& kernel = unpack_kernel<NmInt8Unpack>(scales, dtype, generic);
  const auto& taken = kernel.covers(weight.layout.n, weight.layout.m) ? kernel : generic;
  for_tiles(weight.layout, first_tile, rows, dtype, dense,
            [&](int64_t tile, int64_t count, void* target) {
              taken.run(weight, scales, tile, count, target);
            });
}

}  // namespace pysparse
