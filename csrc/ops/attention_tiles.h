#pragma once
// What every attention operation shares: where each sequence's rows and keys are, its keys and
// values packed, and the tiles of one task.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "pysparse/attention.h"
#include "pysparse/error.h"
#include "pysparse/parallel.h"

namespace pysparse {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct FreeAligned {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Whole cache lines, not written: a vector would touch every page twice.
template <class T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t count = 0) { reserve(count); }
  T* data() const { return memory_.get(); }
  void reserve(int64_t count) {
    if (count <= count_) return;
    memory_.reset();
    memory_.reset(static_cast<T*>(
        ::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{64})));
    count_ = count;
  }

 private:
  std::unique_ptr<T[], FreeAligned> memory_;
  int64_t count_ = 0;
};

// One sequence: its keys are [start, start + length) of the tensor, its rows [first_row, end_row),
// and row r stands at position r + shift among its keys.
struct Sequence {
  int64_t start, length, first_row, end_row, shift;
};

// Checks every size and range of the problem, before any tensor is read.
std::vector<Sequence> sequences_of(const AttentionProblem& problem);
// Checks offsets and items: ascending lists within [0, bound).
void check_lists(const AttentionProblem& problem, const AttentionLists& lists, int64_t bound,
                 const char* item);

template <class T>
T* at(const AttentionTensor& tensor, int64_t size, int64_t batch, int64_t head, int64_t row) {
  const int64_t element =
      batch * tensor.batch_stride + head * tensor.head_stride + row * tensor.row_stride;
  return reinterpret_cast<T*>(static_cast<char*>(tensor.values) + element * size);
}

// Calls body(index) for each index in [0, count) once; whichever thread is free takes the next.
// Each index writes what no other does, so the order does not show.
template <class Body>
void take_in_turns(int64_t count, int threads, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel(static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(count, 1))),
           [&](int, int) {
             auto worker = body();
             for (int64_t i = next++; i < count; i = next++) worker(i);
           });
}

// The sizes that a kernel and a head dimension give.
struct TileShape {
  explicit TileShape(const AttentionProblem& problem)
      : kernel(lookup<AttentionTile>(problem.dtype)),
        padded(static_cast<int>(ceil_div(problem.dim, 16) * 16)),
        depth(padded / kernel.keys_per_word) {}

  int64_t query_words() const { return int64_t{depth} * kernel.width; }
  int64_t value_words(int64_t keys) const { return ceil_div(keys, kernel.keys_per_word) * padded; }

  const AttentionTile::Kernel& kernel;
  int padded, depth;
};

// The keys, and if wanted the values, of every sequence and key head, packed.
class PackedKeys {
 public:
  PackedKeys(const AttentionProblem& problem, const std::vector<Sequence>& sequences,
             const TileShape& shape, bool values);

  const uint32_t* keys(int64_t b, int64_t head, int64_t position) const {
    return keys_.data() + key_begin(b, head) + position * shape_.depth;
  }
  // `position` is even.
  const uint32_t* values(int64_t b, int64_t head, int64_t position) const {
    return values_.data() + value_begin(b, head) +
           position / shape_.kernel.keys_per_word * shape_.padded;
  }

 private:
  int64_t slot(int64_t b, int64_t head) const { return b * problem_.key_heads + head; }
  int64_t key_begin(int64_t b, int64_t head) const {
    return slot(b, head) * longest_ * shape_.depth;
  }
  int64_t value_begin(int64_t b, int64_t head) const {
    return slot(b, head) * shape_.value_words(longest_);
  }

  const AttentionProblem& problem_;
  const TileShape& shape_;
  int64_t longest_;
  AlignedArray<uint32_t> keys_, values_;
};

// The tiles of one task: their packed queries and their states, in memory that the thread keeps.
class Tiles {
 public:
  Tiles(const AttentionProblem& problem, const TileShape& shape) : p_(problem), shape_(shape) {}

  // Makes room for `count` tiles.
  void reserve(int64_t count) {
    const int64_t width = shape_.kernel.width;
    words_.reserve(count * shape_.query_words());
    states_.reserve(count * state_floats());
    scratch_.reserve(2 * kPanelKeys * width);
    tiles_.resize(
        static_cast<size_t>(std::max<int64_t>(count, static_cast<int64_t>(tiles_.size()))));
  }

  // Tile t becomes `rows` rows from `first_row` on of a head, with an empty state.
  void begin(int64_t t, const Sequence& sequence, int64_t b, int64_t head, int64_t first_row,
             int64_t rows);
  // Continues the state that (out, maximum, denominator) hold.
  void resume(int64_t t, const AttentionTensor& out, const float* maximum,
              const float* denominator);
  // Shows `count` packed keys; `position` is that of the first, or negative where all rows see all.
  void add(int64_t t, const uint32_t* keys, const uint32_t* values, int64_t count,
           int64_t position);
  // Panels [begin, end) of the packed keys to tiles [first, first + count), panel by panel: a panel
  // stays in the cache for all of them. Under a causal mask each tile sees what is not after it.
  void sweep(int64_t first, int64_t count, const PackedKeys& packed, int64_t key_head,
             int64_t begin, int64_t end);
  void finish(int64_t t, const AttentionResult& result);

  // Largest scaled logit of a lane of tile t.
  float maximum(int64_t t, int64_t lane) const { return state(t).maximum[lane] * p_.scale; }
  int64_t position(int64_t t) const { return tiles_[static_cast<size_t>(t)].position; }
  const uint32_t* words(int64_t t) const { return words_.data() + t * shape_.query_words(); }
  float* scratch() const { return scratch_.data(); }

 private:
  struct Tile {
    int64_t batch, head, first_row, rows, position;
  };
  int64_t state_floats() const { return (shape_.padded + 3) * int64_t{shape_.kernel.width}; }
  AttentionTileState state(int64_t t) const {
    float* out = states_.data() + t * state_floats();
    float* rows = out + int64_t{shape_.padded} * shape_.kernel.width;
    return {out, rows, rows + shape_.kernel.width, rows + 2 * shape_.kernel.width};
  }

  const AttentionProblem& p_;
  const TileShape& shape_;
  AlignedArray<uint32_t> words_;
  AlignedArray<float> states_, scratch_;
  std::vector<Tile> tiles_;
};

// Writes the result of rows that see no key at all: those outside their sequence.
void clear_other_rows(const AttentionProblem& problem, const std::vector<Sequence>& sequences,
                      const AttentionResult& result);

inline int attention_threads(const AttentionProblem& p) {
  return threads_for(p.batch * p.heads * p.rows * std::max<int64_t>(1, p.keys / 16) * p.dim);
}

}  // namespace pysparse
