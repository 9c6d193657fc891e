#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bind.h"
#include "pysparse/attention.h"
#include "pysparse/rotary.h"
#include "pysparse/row_attention.h"

namespace pysparse {
namespace {

using Tensor =
    std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, batch, head, row stride
// dtype, batch, heads, key heads, rows, keys, dim
using Shape = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
using Span = std::tuple<float, bool, int64_t, uintptr_t>;  // scale, causal, q_offset, key_range
// out, whether a state, lse, maximum, denominator
using Result = std::tuple<Tensor, bool, uintptr_t, uintptr_t, uintptr_t>;
// offsets, items, their numbers, heads, group size
using Lists = std::tuple<uintptr_t, uintptr_t, int64_t, int64_t, int64_t, int64_t>;

AttentionTensor tensor(const Tensor& t) {
  return {pointer<void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t)};
}

AttentionProblem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape,
                         const Span& span) {
  const auto [dtype, batch, heads, key_heads, rows, keys, dim] = shape;
  const auto [scale, causal, q_offset, key_range] = span;
  return {tensor(q), tensor(k),
          tensor(v), dtype_of(dtype),
          batch,     heads,
          key_heads, rows,
          keys,      dim,
          scale,     causal,
          q_offset,  pointer<const int64_t>(key_range)};
}

AttentionResult result(const Result& r) {
  const auto& [out, state, lse, maximum, denominator] = r;
  return {tensor(out), state, pointer<float>(lse), pointer<float>(maximum),
          pointer<float>(denominator)};
}

AttentionLists lists(const Lists& l) {
  const auto [offsets, items, offset_count, item_count, heads, group_size] = l;
  return {pointer<const int64_t>(offsets),
          pointer<const int32_t>(items),
          offset_count,
          item_count,
          heads,
          group_size};
}

using Region = std::tuple<int64_t, int64_t, int64_t>;  // group size, init, local
using Rule = std::tuple<float, int64_t, bool>;         // theta, pools, share_kv

AttentionRegion region(const Region& r) { return {std::get<0>(r), std::get<1>(r), std::get<2>(r)}; }

StripeRule rule(const Rule& r) { return {std::get<0>(r), std::get<1>(r), std::get<2>(r)}; }

// Writes the lists' offsets, then asks `allocate` for room for so many keys.
void hand_over(const StripeLists& lists, uintptr_t offsets, const pybind11::function& allocate) {
  auto* offset = pointer<int64_t>(offsets);
  *offset = 0;
  for (const auto& list : lists) {
    offset[1] = *offset + static_cast<int64_t>(list.size());
    ++offset;
  }
  auto* key = pointer<int32_t>(allocate(*offset).cast<uintptr_t>());
  for (const auto& list : lists) key = std::copy(list.begin(), list.end(), key);
}

// dtype, batch, heads, key heads, keys, dim, value dim
using RowShape = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;

void call_row_attention(const Tensor& q, const Tensor& k, const Tensor& v, const RowShape& shape,
                        float scale, uintptr_t out) {
  const auto [dtype, batch, heads, key_heads, keys, dim, value_dim] = shape;
  row_attention({tensor(q), tensor(k), tensor(v), dtype_of(dtype), batch, heads, key_heads, keys,
                 dim, value_dim, scale},
                pointer<void>(out));
}

using Rotated = std::tuple<Tensor, Tensor, int64_t>;  // x, y, heads
// address, batch and row stride
using Angles = std::tuple<uintptr_t, int64_t, int64_t>;
using RotaryShape = std::tuple<int, int64_t, int64_t, int64_t>;  // dtype, batch, rows, dim

void call_rotary(const Rotated& q, const Rotated& k, const Angles& cosine, const Angles& sine,
                 const RotaryShape& shape) {
  const auto rotated = [](const Rotated& r) {
    return RotaryTensor{tensor(std::get<0>(r)), tensor(std::get<1>(r)), std::get<2>(r)};
  };
  const auto [cosine_values, cosine_batch, cosine_row] = cosine;
  const auto [sine_values, sine_batch, sine_row] = sine;
  const auto [dtype, batch, rows, dim] = shape;
  rotary({rotated(q),
          rotated(k),
          {pointer<const void>(cosine_values), pointer<const void>(sine_values), cosine_batch,
           cosine_row, sine_batch, sine_row},
          dtype_of(dtype),
          batch,
          rows,
          dim});
}

}  // namespace

void bind_attention(pybind11::module_& module) {
  module.def("rotary", &call_rotary, ReleaseGil());
  module.def("row_attention", &call_row_attention, ReleaseGil());
  module.def(
      "flash_attention",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape, const Span& span,
         const Result& to) { flash_attention(problem(q, k, v, shape, span), result(to)); },
      ReleaseGil());
  module.def(
      "block_sparse_attention",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape, const Span& span,
         const Lists& blocks, int64_t block_k, const Result& to) {
        block_sparse_attention(problem(q, k, v, shape, span), lists(blocks), block_k, result(to));
      },
      ReleaseGil());
  module.def(
      "anchor_state",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape, const Span& span,
         const Region& anchor, const Result& to) {
        anchor_state(problem(q, k, v, shape, span), region(anchor), result(to));
      },
      ReleaseGil());
  module.def(
      "stripe_attention",
      [](const Tensor& q, const Tensor& k, const Tensor& v, const Shape& shape, const Span& span,
         const Lists& stripes, const Result& before, const Result& to) {
        const AttentionResult state = result(before);
        stripe_attention(problem(q, k, v, shape, span), lists(stripes),
                         state.maximum ? &state : nullptr, result(to));
      },
      ReleaseGil());
  module.def("identify_stripes",
             [](const Tensor& q, const Tensor& k, const Shape& shape, const Span& span,
                uintptr_t anchor, const Region& around, const Rule& by, uintptr_t offsets,
                const pybind11::function& allocate) {
               StripeLists found;
               {
                 const pybind11::gil_scoped_release release;
                 found = identify_stripes(problem(q, k, k, shape, span),
                                          pointer<const float>(anchor), region(around), rule(by));
               }
               hand_over(found, offsets, allocate);
             });
  module.def("anchor_attention", [](const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Shape& shape, const Span& span, const Region& around,
                                    const Rule& by, const Result& to, uintptr_t offsets,
                                    const pybind11::function& allocate) {
    StripeLists found;
    {
      const pybind11::gil_scoped_release release;
      found = anchor_attention(problem(q, k, v, shape, span), region(around), rule(by), result(to));
    }
    hand_over(found, offsets, allocate);
  });
  module.def(
      "proxy_scores",
      [](const Tensor& q, const Tensor& k, const Shape& shape, const Span& span, int64_t proxies,
         int64_t block, int64_t stride, uintptr_t scores) {
        proxy_scores(problem(q, k, k, shape, span), {proxies, block, stride},
                     pointer<float>(scores));
      },
      ReleaseGil());
  module.def(
      "block_mass",
      [](const Tensor& q, const Tensor& k, const Shape& shape, const Span& span, int64_t block,
         uintptr_t mass) {
        block_mass(problem(q, k, k, shape, span), block, pointer<float>(mass));
      },
      ReleaseGil());
}

}  // namespace pysparse
