#pragma once
// Attention over chosen keys. Plain pointers and sizes as in api.h; no allocation, no
// synchronisation.
#include "api.h"

namespace pysparse::cuda {

// A tensor [batch, heads, rows, dim]: strides in elements, multiples of 8; dim is contiguous.
struct HeadRows {
  const void* data;
  int64_t batch, head, row;
};

// What a softmax over some keys leaves behind, to be continued over others: float32, contiguous.
struct SoftmaxState {
  float* mean;         // [batch, heads, queries, dim]: sum of exp(score - max) v / denominator
  float* max;          // [batch, heads, queries]: largest score, -inf before the first key
  float* denominator;  // [batch, heads, queries]: sum of exp(score - max)
};

struct AttentionProblem {
  HeadRows q, k, v;
  void* out;  // like q in dtype; null: the state alone is wanted
  int64_t out_batch, out_head, out_row;
  float* lse;                // [batch, heads, queries], or null
  SoftmaxState before;       // null members: no key has been seen yet
  SoftmaxState after;        // null members: not wanted
  const int32_t* first_key;  // [batch]: keys before it are padding; null: 0
  const int32_t* end_key;    // [batch]: keys from it on are padding; null: `keys`
  int batch, heads, kv_heads, queries, keys, dim;
  int offset;  // key index at which the first query stands; a causal query sees keys up to its own
  float scale;
  bool causal;
  DType dtype;
};

enum class KeySet : int { kSpans = 0, kStripes = 1, kBlocks = 2 };

// Which keys a query meets. Positions, groups and blocks count from the sequence's first key; lists
// are by (sequence, list head, group), in compressed rows.
//   kSpans    positions below head_keys, and those from group start - extra_keys on
//   kStripes  the keys listed (rows of the key tensor), all of them before the group's first
//   kBlocks   blocks of `block` keys; causal inside
struct KeyChoice {
  KeySet set;
  int group;  // positions that share a list, a multiple of 128; 0: one group (dense)
  int head_keys, extra_keys;
  const int64_t* offsets;  // [batch * list_heads * groups + 1]
  const int32_t* indices;
  int list_heads, groups;
  int block;  // a multiple of 64
};

int attention(const AttentionProblem& problem, const KeyChoice& keys, const Target& target);

// Stripes of AnchorAttention: key j is kept for a group unless scale pooled . k_j < floor for all
// of the group's pooled rows (a NaN keeps the key). Candidates are positions [head_keys, group
// start - extra_keys), those of groups before first_group are not looked at. `bits` must be zero
// before.
struct StripeSearch {
  HeadRows pooled;  // [batch, heads, groups * rows, dim]
  HeadRows k;
  const float* floor;  // [batch, heads, groups * rows]; +inf: the row keeps nothing
  const int32_t* first_key;
  uint32_t* bits;  // [batch, heads, groups, words], one bit a key
  int batch, heads, kv_heads, groups, rows, keys, dim, words;
  int group, first_group;  // positions per group; the first one that has queries
  int head_keys, extra_keys;
  float scale;
  DType dtype;
};
int find_stripes(const StripeSearch& search, const Target& target);

// From bits to lists: the bits set in each row, then, where each row's list starts, the lists.
int count_stripes(const uint32_t* bits, int64_t rows, int words, int64_t* counts,
                  const Target& target);
int list_stripes(const uint32_t* bits, int64_t rows, int words, const int64_t* offsets,
                 int32_t* indices, const Target& target);

}  // namespace pysparse::cuda
