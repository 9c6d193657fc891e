#pragma once
// Attention of query rows over all keys, over stripes and over blocks of keys, with an online
// softmax.
//
// A tile is some rows of one head, side by side in the lanes of vectors ("rows in lanes"): then a
// key is only a pointer whose words are broadcast, the running maximum and sum are plain vectors,
// and nothing is ever reduced across lanes. A panel is up to kPanelKeys packed keys. One kernel,
// tile times panel, serves dense, block-sparse and stripe-sparse products; the operations differ in
// which panels they show to which tile.
//
// Positions count from a sequence's first valid key, whatever pads it on the left.
#include <cstdint>
#include <vector>

#include "pysparse/kernel_table.h"

namespace pysparse {

inline constexpr int kPanelKeys = 128;
inline constexpr int kPoolLanes = 16;  // pooled rows that one call of `mark` compares
inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kListUnit = 16;  // of group and block sizes and of region bounds
inline constexpr float kLog2E = 1.44269504f;

// Rows of a tensor: row i is number i, or number index[i], from `first` on.
struct AttentionRows {
  const void* first;
  int64_t stride;        // elements between rows; within a row they are contiguous
  const int32_t* index;  // may be null
  int count;
  int dim;
};

// Keys and values as words of 32 bits: an fp32 value, or where keys_per_word is 2 a pair of bf16,
// neighbours of one row for queries and keys, of two rows for values. `padded` is the head
// dimension rounded up to 16 and zero beyond.
struct AttentionPanel {
  const uint32_t* queries;  // [padded / keys_per_word][width]
  const uint32_t* keys;     // [count][padded / keys_per_word]
  const uint32_t* values;   // [ceil(count / keys_per_word)][padded]
  int count;
  int padded;
  int diagonal;  // key t is seen by the rows r >= t - diagonal; kPanelKeys or more: by all
  float scale;   // of the logits, times log2(e)
};

// The softmax so far of one tile, rows in lanes: weights are 2^(scale * (logit - reference)).
// The reference trails the maximum by a bounded factor, so that `out` is seldom rescaled.
struct AttentionTileState {
  float* out;        // [padded][width]
  float* reference;  // [width], raw dot products, finite from the start
  float* maximum;    // [width], raw dot products, -inf before the first key
  float* sum;        // [width]
};

struct AttentionTile {
  static constexpr const char* op = "attention";
  static constexpr const char* format = "tile";
  struct Kernel {
    int width;          // rows of a tile
    int keys_per_word;  // 1 or 2
    // Rows beyond the count become zero; `width` is the tile's, or kPoolLanes for pooled rows.
    void (*pack_queries)(const AttentionRows& rows, int padded, int width, uint32_t* words);
    void (*pack_keys)(const AttentionRows& rows, int padded, uint32_t* words);
    void (*pack_values)(const AttentionRows& rows, int padded, uint32_t* words);
    // Adds a panel's keys to a state; `scratch` has 2 * kPanelKeys * width floats.
    void (*add_panel)(const AttentionPanel& panel, const AttentionTileState& state, float* scratch);
    // Of the panel alone, per row: the largest dot product, -inf where no key is seen, and the sum
    // of 2^(scale * (dot product - that)).
    void (*weigh_panel)(const AttentionPanel& panel, float* maximum, float* sum, float* scratch);
    // keep[j] |= a row u of the packed pools [..][kPoolLanes] has a dot product with key j that is
    // not below thresholds[u].
    void (*mark)(const uint32_t* pools, const float* thresholds, const uint32_t* keys,
                 int64_t count, int padded, uint8_t* keep);
    // out[lane][..dim] = state.out / state.sum, 0 where the sum is 0; in fp32, or in the kernel's
    // type.
    void (*store)(const AttentionTileState& state, int rows, int dim, bool as_float, void* out,
                  int64_t stride);
    // state.out = out * state.sum: continues what `store` wrote in fp32.
    void (*load)(const float* out, int64_t stride, int rows, int dim, int padded,
                 const AttentionTileState& state);
  };
};

// A tensor [batch, heads, rows, dim], the last dimension contiguous; strides in elements.
struct AttentionTensor {
  void* values;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionProblem {
  AttentionTensor q, k, v;
  DType dtype;
  int64_t batch, heads, key_heads, rows, keys, dim;
  float scale;  // of the logits
  bool causal;
  int64_t q_offset;          // key index of the first row
  const int64_t* key_range;  // [batch][2]: begin and end of each sequence's keys; null: all
};

// Where results go; a null pointer is left out. `out` is fp32 for a state and of the problem's type
// otherwise; a row without keys gets 0, -inf, -inf, 0.
struct AttentionResult {
  AttentionTensor out;
  bool state;
  float* lse;          // [batch][heads][rows]
  float* maximum;      // the same, scaled logits
  float* denominator;  // the same
};

// CSR lists of keys or blocks of keys, [batch][heads][groups], ascending.
struct AttentionLists {
  const int64_t* offsets;
  const int32_t* items;
  int64_t offset_count, item_count;
  int64_t heads;  // divides the query heads: consecutive ones share a list
  int64_t group_size;
};

struct AttentionRegion {
  int64_t group_size, init, local;
};

struct StripeRule {
  float theta;
  int64_t pools;
  bool share_kv;
};

// Keys of each list, [batch][heads][groups], rows of the key tensor.
using StripeLists = std::vector<std::vector<int32_t>>;

void flash_attention(const AttentionProblem& problem, const AttentionResult& result);
void block_sparse_attention(const AttentionProblem& problem, const AttentionLists& blocks,
                            int64_t block_k, const AttentionResult& result);

// Attention over the region alone.
void anchor_state(const AttentionProblem& problem, const AttentionRegion& region,
                  const AttentionResult& result);
// `anchor` [batch][heads][rows]: the maxima of anchor_state.
StripeLists identify_stripes(const AttentionProblem& problem, const float* anchor,
                             const AttentionRegion& region, const StripeRule& rule);
// `before`: a state to continue, or null.
void stripe_attention(const AttentionProblem& problem, const AttentionLists& stripes,
                      const AttentionResult* before, const AttentionResult& result);
// The three in one pass.
StripeLists anchor_attention(const AttentionProblem& problem, const AttentionRegion& region,
                             const StripeRule& rule, const AttentionResult& result);

struct ProxyGrid {
  int64_t proxies, block, stride;
};

// scores: [batch][proxies][q blocks][key blocks].
void proxy_scores(const AttentionProblem& problem, const ProxyGrid& grid, float* scores);
// mass: [batch][heads][key blocks].
void block_mass(const AttentionProblem& problem, int64_t block, float* mass);

}  // namespace pysparse
