// Attention kernels of _cuda: a tensor is its address and three strides in elements.
#include <pybind11/stl.h>

#include <array>

#include "attention.h"
#include "cuda_bind.h"

namespace pysparse::cuda {
namespace {

using Strided = std::array<int64_t, 4>;  // address, then strides of batch, head and row

HeadRows head_rows(const Strided& x, const char* name) {
  for (int i = 1; i < 4; ++i)
    if (x[i] % 8)
      throw std::invalid_argument(std::string(name) + " has a stride of " + std::to_string(x[i]) +
                                  " elements; attention kernels read 8 at a time");
  if (x[0] % 16)
    throw std::invalid_argument(std::string(name) + " must start at a multiple of 16 bytes");
  return {pointer<const void>(static_cast<uintptr_t>(x[0])), x[1], x[2], x[3]};
}

SoftmaxState state(const std::array<uintptr_t, 3>& arrays) {
  return {pointer<float>(arrays[0]), pointer<float>(arrays[1]), pointer<float>(arrays[2])};
}

void run_attention(int dtype, const Strided& q, const Strided& k, const Strided& v,
                   const Strided& out, uintptr_t lse, const std::array<uintptr_t, 3>& before,
                   const std::array<uintptr_t, 3>& after, const std::array<uintptr_t, 2>& valid,
                   const std::array<int64_t, 6>& sizes, int64_t offset, float scale, bool causal,
                   int set, const std::array<int64_t, 3>& spans,
                   const std::array<uintptr_t, 2>& lists, const std::array<int64_t, 3>& list_sizes,
                   int device, uintptr_t stream) {
  AttentionProblem p{};
  p.q = head_rows(q, "q"), p.k = head_rows(k, "k"), p.v = head_rows(v, "v");
  p.out = pointer<void>(static_cast<uintptr_t>(out[0]));
  p.out_batch = out[1], p.out_head = out[2], p.out_row = out[3];
  p.lse = pointer<float>(lse);
  p.before = state(before), p.after = state(after);
  p.first_key = pointer<const int32_t>(valid[0]), p.end_key = pointer<const int32_t>(valid[1]);
  p.batch = narrow_size(sizes[0], "batch"), p.heads = narrow_size(sizes[1], "heads");
  p.kv_heads = narrow_size(sizes[2], "kv_heads"), p.queries = narrow_size(sizes[3], "queries");
  p.keys = narrow_size(sizes[4], "keys"), p.dim = narrow_size(sizes[5], "head_dim");
  p.offset = narrow_size(offset, "offset"), p.scale = scale, p.causal = causal;
  p.dtype = static_cast<DType>(dtype);
  KeyChoice c{};
  c.set = static_cast<KeySet>(set);
  c.group = narrow_size(spans[0], "group"), c.head_keys = narrow_size(spans[1], "head_keys");
  c.extra_keys = narrow_size(spans[2], "extra_keys");
  c.offsets = pointer<const int64_t>(lists[0]), c.indices = pointer<const int32_t>(lists[1]);
  c.list_heads = narrow_size(list_sizes[0], "list_heads");
  c.groups = narrow_size(list_sizes[1], "groups"), c.block = narrow_size(list_sizes[2], "block");
  check(attention(p, c, {device, pointer<void>(stream)}), "attention");
}

void run_find_stripes(int dtype, const Strided& pooled, const Strided& k, uintptr_t floor,
                      uintptr_t first_key, uintptr_t bits, const std::array<int64_t, 8>& sizes,
                      const std::array<int64_t, 4>& spans, float scale, int device,
                      uintptr_t stream) {
  StripeSearch s{};
  s.pooled = head_rows(pooled, "pooled"), s.k = head_rows(k, "k");
  s.floor = pointer<const float>(floor), s.first_key = pointer<const int32_t>(first_key);
  s.bits = pointer<uint32_t>(bits);
  s.batch = narrow_size(sizes[0], "batch"), s.heads = narrow_size(sizes[1], "heads");
  s.kv_heads = narrow_size(sizes[2], "kv_heads"), s.groups = narrow_size(sizes[3], "groups");
  s.rows = narrow_size(sizes[4], "rows"), s.keys = narrow_size(sizes[5], "keys");
  s.dim = narrow_size(sizes[6], "head_dim"), s.words = narrow_size(sizes[7], "words");
  s.group = narrow_size(spans[0], "group"), s.first_group = narrow_size(spans[1], "first_group");
  s.head_keys = narrow_size(spans[2], "head_keys");
  s.extra_keys = narrow_size(spans[3], "extra_keys");
  s.scale = scale, s.dtype = static_cast<DType>(dtype);
  check(find_stripes(s, {device, pointer<void>(stream)}), "find_stripes");
}

}  // namespace

void bind_attention(pybind11::module_& module) {
  module.def("attention", run_attention);
  module.def("find_stripes", run_find_stripes);
  module.def("count_stripes", [](uintptr_t bits, int64_t rows, int64_t words, uintptr_t counts,
                                 int device, uintptr_t stream) {
    check(count_stripes(pointer<const uint32_t>(bits), rows, narrow_size(words, "words"),
                        pointer<int64_t>(counts), {device, pointer<void>(stream)}),
          "count_stripes");
  });
  module.def("list_stripes", [](uintptr_t bits, int64_t rows, int64_t words, uintptr_t offsets,
                                uintptr_t indices, int device, uintptr_t stream) {
    check(list_stripes(pointer<const uint32_t>(bits), rows, narrow_size(words, "words"),
                       pointer<const int64_t>(offsets), pointer<int32_t>(indices),
                       {device, pointer<void>(stream)}),
          "list_stripes");
  });
}

}  // namespace pysparse::cuda
