#include "attention_tiles.h"

#include <limits>

namespace pysparse {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
}

std::vector<Sequence> sequences_of(const AttentionProblem& p) {
  check(p.batch >= 0 && p.heads >= 0 && p.rows >= 0 && p.keys >= 0, "negative shape");
  check(p.dim >= 1 && p.dim <= kMaxHeadDim, "head dimension ", p.dim, " is not in 1..",
        kMaxHeadDim);
  check(p.key_heads >= 1 && p.heads % p.key_heads == 0, p.key_heads, " key heads do not divide ",
        p.heads, " query heads");
  check(p.scale > 0 && p.scale < kInfinity, "scale ", p.scale, " is not a positive number");
  check(p.keys < int64_t{1} << 31, p.keys, " keys, at most 2^31 - 1 can be numbered");
  check(p.q_offset >= 0 && (!p.causal || p.q_offset + p.rows <= p.keys), "q_offset ", p.q_offset,
        " puts ", p.rows, " rows outside ", p.keys, " keys");
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t start = p.key_range ? p.key_range[2 * b] : 0;
    const int64_t end = p.key_range ? p.key_range[2 * b + 1] : p.keys;
    check(0 <= start && start <= end && end <= p.keys, "key_range of sequence ", b, " is [", start,
          ", ", end, "), it must lie in [0, ", p.keys, ")");
    // Without a mask the rows' positions only number their blocks: padding of the keys shifts none.
    Sequence one{start, end - start, 0, p.rows, p.q_offset};
    if (p.causal) {
      one.shift -= start;
      one.first_row = std::clamp<int64_t>(start - p.q_offset, 0, p.rows);
      one.end_row = std::clamp<int64_t>(end - p.q_offset, one.first_row, p.rows);
      // Keys after the last row are seen by none.
      one.length = std::min(one.length, std::max<int64_t>(0, one.end_row + one.shift));
    }
    sequences.push_back(one);
  }
  return sequences;
}

void check_lists(const AttentionProblem& p, const AttentionLists& lists, int64_t bound,
                 const char* item) {
  check(lists.heads >= 1 && p.heads % lists.heads == 0, "lists of ", lists.heads,
        " heads do not divide ", p.heads, " query heads");
  check(lists.group_size >= kListUnit && lists.group_size % kListUnit == 0, "group size ",
        lists.group_size, " is not a positive multiple of ", kListUnit);
  const int64_t heads = p.batch * lists.heads, count = lists.offset_count - 1;
  const int64_t needed = ceil_div(p.q_offset + p.rows, lists.group_size);
  check(heads > 0 ? count % heads == 0 && count / heads >= needed : count >= 0, count,
        " lists for ", heads, " heads of at least ", needed, " groups");
  check(lists.offsets[0] == 0 && lists.offsets[count] == lists.item_count, "offsets run from ",
        lists.offsets[0], " to ", lists.offsets[count], ", there are ", lists.item_count, " ", item,
        "s");
  for (int64_t i = 0; i < count; ++i)  // before any of them leads to an item
    check(lists.offsets[i] <= lists.offsets[i + 1], "list ", i, " begins at ", lists.offsets[i],
          " and ends at ", lists.offsets[i + 1]);
  parallel_for(count, 4 * lists.item_count, [&](int64_t i) {
    int64_t least = 0;
    for (int64_t j = lists.offsets[i]; j < lists.offsets[i + 1]; ++j) {
      const int64_t one = lists.items[j];
      check(one >= least && one < bound, item, " ", one, " of list ", i,
            one < 0 || one >= bound ? " must lie in [0, " : " does not ascend within [0, ", bound,
            ")");
      least = one + 1;
    }
  });
}

PackedKeys::PackedKeys(const AttentionProblem& problem, const std::vector<Sequence>& sequences,
                       const TileShape& shape, bool values)
    : problem_(problem), shape_(shape), longest_(0) {
  for (const Sequence& one : sequences) longest_ = std::max(longest_, ceil_div(one.length, 2) * 2);
  const int64_t slots = problem.batch * problem.key_heads;
  keys_.reserve(slots * longest_ * shape.depth);
  if (values) values_.reserve(slots * shape.value_words(longest_));
  const int64_t panels = ceil_div(longest_, kPanelKeys), size = size_of(problem.dtype);
  parallel_for(slots * panels, slots * longest_ * problem.dim * size * 2, [&](int64_t i) {
    const int64_t b = i / panels / problem.key_heads, head = i / panels % problem.key_heads;
    const int64_t first = i % panels * kPanelKeys;
    const Sequence& one = sequences[static_cast<size_t>(b)];
    const int count = static_cast<int>(std::min<int64_t>(kPanelKeys, one.length - first));
    if (count <= 0) return;
    const auto rows = [&](const AttentionTensor& tensor) {
      return AttentionRows{at<char>(tensor, size, b, head, one.start + first), tensor.row_stride,
                           nullptr, count, static_cast<int>(problem.dim)};
    };
    shape.kernel.pack_keys(rows(problem.k), shape.padded,
                           keys_.data() + key_begin(b, head) + first * shape.depth);
    if (values)
      shape.kernel.pack_values(rows(problem.v), shape.padded,
                               values_.data() + value_begin(b, head) +
                                   first / shape.kernel.keys_per_word * shape.padded);
  });
}

void Tiles::begin(int64_t t, const Sequence& sequence, int64_t b, int64_t head, int64_t first_row,
                  int64_t rows) {
  tiles_[static_cast<size_t>(t)] = {b, head, first_row, rows, first_row + sequence.shift};
  const AttentionRows view{at<char>(p_.q, size_of(p_.dtype), b, head, first_row), p_.q.row_stride,
                           nullptr, static_cast<int>(rows), static_cast<int>(p_.dim)};
  shape_.kernel.pack_queries(view, shape_.padded, shape_.kernel.width,
                             words_.data() + t * shape_.query_words());
  const AttentionTileState empty = state(t);
  const int width = shape_.kernel.width;
  std::fill_n(empty.out, int64_t{shape_.padded} * width, 0.0f);
  std::fill_n(empty.reference, width, -1e30f);
  std::fill_n(empty.maximum, width, -kInfinity);
  std::fill_n(empty.sum, width, 0.0f);
}

void Tiles::resume(int64_t t, const AttentionTensor& out, const float* maximum,
                   const float* denominator) {
  const Tile& tile = tiles_[static_cast<size_t>(t)];
  const AttentionTileState to = state(t);
  const int64_t first = (tile.batch * p_.heads + tile.head) * p_.rows + tile.first_row;
  for (int64_t i = 0; i < tile.rows; ++i) {
    if (maximum[first + i] == -kInfinity && denominator[first + i] == 0) continue;  // saw no key
    to.maximum[i] = maximum[first + i] / p_.scale;
    // A row whose logits are all NaN has a denominator, NaN, and no maximum.
    to.reference[i] = std::max(to.maximum[i], -1e30f);
    to.sum[i] = denominator[first + i];
  }
  shape_.kernel.load(at<float>(out, sizeof(float), tile.batch, tile.head, tile.first_row),
                     out.row_stride, static_cast<int>(tile.rows), static_cast<int>(p_.dim),
                     shape_.padded, to);
}

void Tiles::add(int64_t t, const uint32_t* keys, const uint32_t* values, int64_t count,
                int64_t position) {
  const Tile& tile = tiles_[static_cast<size_t>(t)];
  const int64_t diagonal =
      position < 0 ? kPanelKeys : std::min<int64_t>(tile.position - position, kPanelKeys);
  const AttentionPanel panel{words(t),         keys,
                             values,           static_cast<int>(count),
                             shape_.padded,    static_cast<int>(diagonal),
                             p_.scale * kLog2E};
  shape_.kernel.add_panel(panel, state(t), scratch_.data());
}

void Tiles::sweep(int64_t first, int64_t count, const PackedKeys& packed, int64_t key_head,
                  int64_t begin, int64_t end) {
  for (int64_t key = begin; key < end; key += kPanelKeys)
    for (int64_t t = first; t < first + count; ++t) {
      const Tile& tile = tiles_[static_cast<size_t>(t)];
      const int64_t seen = p_.causal ? std::min(end, tile.position + tile.rows) : end;
      const int64_t shown = std::min<int64_t>(kPanelKeys, seen - key);
      if (shown > 0)
        add(t, packed.keys(tile.batch, key_head, key), packed.values(tile.batch, key_head, key),
            shown, p_.causal ? key : -1);
    }
}

void Tiles::finish(int64_t t, const AttentionResult& result) {
  const Tile& tile = tiles_[static_cast<size_t>(t)];
  const AttentionTileState from = state(t);
  const int64_t size = result.state ? sizeof(float) : size_of(p_.dtype);
  shape_.kernel.store(from, static_cast<int>(tile.rows), static_cast<int>(p_.dim), result.state,
                      at<char>(result.out, size, tile.batch, tile.head, tile.first_row),
                      result.out.row_stride);
  const int64_t first = (tile.batch * p_.heads + tile.head) * p_.rows + tile.first_row;
  for (int64_t i = 0; i < tile.rows; ++i) {
    const float maximum = from.maximum[i] * p_.scale, sum = from.sum[i];
    if (result.lse)  // of the reference: it is finite where the maximum may be an infinity
      result.lse[first + i] = sum == 0 ? -kInfinity : from.reference[i] * p_.scale + std::log(sum);
    if (result.maximum) result.maximum[first + i] = maximum;
    if (result.denominator)
      result.denominator[first + i] =
          sum == 0 ? 0.0f : sum * std::exp((from.reference[i] - from.maximum[i]) * p_.scale);
  }
}

void clear_other_rows(const AttentionProblem& p, const std::vector<Sequence>& sequences,
                      const AttentionResult& result) {
  const int64_t size = result.state ? sizeof(float) : size_of(p.dtype);
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& one = sequences[static_cast<size_t>(b)];
    for (int64_t h = 0; h < p.heads; ++h)
      for (int64_t r = 0; r < p.rows; ++r) {
        if (r == one.first_row) r = std::max(r, one.end_row);
        if (r >= p.rows) break;
        const int64_t place = (b * p.heads + h) * p.rows + r;
        std::fill_n(at<char>(result.out, size, b, h, r), p.dim * size, char{0});
        if (result.lse) result.lse[place] = -kInfinity;
        if (result.maximum) result.maximum[place] = -kInfinity;
        if (result.denominator) result.denominator[place] = 0.0f;
      }
  }
}

}  // namespace pysparse
