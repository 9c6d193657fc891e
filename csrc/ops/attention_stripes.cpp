// AnchorAttention: each group of rows attends to an anchor region, finds the keys that come near
// its maxima, and goes on over these. A group is one task, so its state stays in the cache
// meanwhile.
#include <cstring>

#include "attention_tiles.h"

namespace pysparse {
namespace {

constexpr int64_t kTilesAtOnce = 4;
constexpr int64_t kGathered = 16 * kPanelKeys;  // chosen keys packed at a time

// One task: the rows of a group, of one query head or of all that share a list.
struct Group {
  int64_t batch, first_head, heads, number, first_row, end_row;
  const Sequence* sequence;

  int64_t start() const { return first_row + sequence->shift; }  // position of the first row here
};

void check_region(const AttentionRegion& region) {
  for (const int64_t size : {region.group_size, region.init, region.local})
    check(size >= 0 && size % kListUnit == 0, "a region of groups of ", region.group_size,
          " rows, init ", region.init, " and local ", region.local, " is not of multiples of ",
          kListUnit);
  check(region.group_size > 0, "a group has at least ", kListUnit, " rows");
}

void check_rule(const AttentionRegion& region, const StripeRule& rule) {
  check(!std::isnan(rule.theta), "theta is NaN");
  check(rule.pools >= 1 && region.group_size % rule.pools == 0, rule.pools,
        " pools do not divide a group of ", region.group_size, " rows");
}

// The candidates of a group, positions [begin, end).
Range candidates(const AttentionRegion& region, int64_t group) {
  const int64_t end = group * region.group_size - region.local;
  return {region.init, std::max(region.init, end)};
}

// Late groups first: they have the most candidates.
std::vector<Group> groups_of(const AttentionProblem& p, const std::vector<Sequence>& sequences,
                             int64_t size, int64_t heads_together) {
  std::vector<Group> groups;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence& one = sequences[static_cast<size_t>(b)];
    if (one.first_row >= one.end_row) continue;
    const int64_t first = (one.first_row + one.shift) / size;
    const int64_t last = (one.end_row - 1 + one.shift) / size;
    for (int64_t h = 0; h < p.heads; h += heads_together)
      for (int64_t g = last; g >= first; --g)
        groups.push_back({b, h, heads_together, g, std::max(one.first_row, g * size - one.shift),
                          std::min(one.end_row, (g + 1) * size - one.shift), &one});
  }
  return groups;
}

// What a thread needs for its groups.
class GroupWorker {
 public:
  GroupWorker(const AttentionProblem& problem, const TileShape& shape)
      : p_(problem), shape_(shape), tiles_(problem, shape) {}

  void begin(const Group& group) {
    const int64_t width = shape_.kernel.width, rows = group.end_row - group.first_row;
    columns_ = ceil_div(rows, width);
    tiles_.reserve(columns_ * group.heads);
    for (int64_t h = 0; h < group.heads; ++h)
      for (int64_t t = 0; t < columns_; ++t)
        tiles_.begin(h * columns_ + t, *group.sequence, group.batch, group.first_head + h,
                     group.first_row + t * width, std::min(width, rows - t * width));
  }

  void resume(const AttentionResult& before) {
    for (int64_t t = 0; t < columns_; ++t)
      tiles_.resume(t, before.out, before.maximum, before.denominator);
  }

  void attend_region(const Group& group, const AttentionRegion& region, const PackedKeys& packed) {
    const Range far = candidates(region, group.number);
    const int64_t key_head = group.first_head / (p_.heads / p_.key_heads);
    const int64_t length = group.sequence->length, count = columns_ * group.heads;
    for (int64_t t = 0; t < count; t += kTilesAtOnce) {
      const int64_t some = std::min(kTilesAtOnce, count - t);
      tiles_.sweep(t, some, packed, key_head, 0, std::min(far.begin, length));
      tiles_.sweep(t, some, packed, key_head, far.end, length);
    }
  }

  // Appends the group's stripes, rows of the key tensor; `anchor_of(head, row)` is a row's maximum.
  template <class Anchor>
  void find(const Group& group, const AttentionRegion& region, const StripeRule& rule,
            const PackedKeys& packed, const Anchor& anchor_of, std::vector<int32_t>& stripes) {
    const Range far = candidates(region, group.number);
    if (far.begin >= far.end) return;
    keep_.assign(static_cast<size_t>(far.end - far.begin), 0);
    const int64_t key_head = group.first_head / (p_.heads / p_.key_heads);
    for (int64_t h = 0; h < group.heads; ++h)
      for (int64_t first = 0; first < rule.pools; first += kPoolLanes) {
        float thresholds[kPoolLanes];
        pool(
            group, group.first_head + h, region, rule, first,
            [&](int64_t row) { return anchor_of(h, row); }, thresholds);
        shape_.kernel.mark(pool_words_.data(), thresholds,
                           packed.keys(group.batch, key_head, far.begin), far.end - far.begin,
                           shape_.padded, keep_.data());
      }
    const int64_t start = group.sequence->start + far.begin;
    stripes.resize(keep_.size());
    size_t kept = 0;
    for (size_t j = 0; j < keep_.size(); ++j) {  // without a branch: the flags are noise
      stripes[kept] = static_cast<int32_t>(start + static_cast<int64_t>(j));
      kept += keep_[j];
    }
    stripes.resize(kept);
    stripes.shrink_to_fit();
  }

  // The maximum of a row of the group, of its head number h within the group.
  float maximum(const Group& group, int64_t h, int64_t row) const {
    const int64_t width = shape_.kernel.width, i = row - group.first_row;
    return tiles_.maximum(h * columns_ + i / width, i % width);
  }

  // Shows the listed keys to every tile; each lies before all rows.
  void attend_stripes(const Group& group, const int32_t* stripes, int64_t count) {
    const int64_t key_head = group.first_head / (p_.heads / p_.key_heads);
    const int64_t size = size_of(p_.dtype), tiles = columns_ * group.heads;
    keys_.reserve(std::min(count, kGathered) * shape_.depth);
    values_.reserve(shape_.value_words(std::min(count, kGathered)));
    for (int64_t first = 0; first < count; first += kGathered) {
      const int64_t some = std::min(kGathered, count - first);
      const auto rows = [&](const AttentionTensor& tensor) {
        return AttentionRows{at<char>(tensor, size, group.batch, key_head, 0), tensor.row_stride,
                             stripes + first, static_cast<int>(some), static_cast<int>(p_.dim)};
      };
      shape_.kernel.pack_keys(rows(p_.k), shape_.padded, keys_.data());
      shape_.kernel.pack_values(rows(p_.v), shape_.padded, values_.data());
      for (int64_t t = 0; t < tiles; t += kTilesAtOnce)
        for (int64_t key = 0; key < some; key += kPanelKeys)
          for (int64_t u = t; u < std::min(tiles, t + kTilesAtOnce); ++u)
            tiles_.add(u, keys_.data() + key * shape_.depth,
                       values_.data() + shape_.value_words(key),
                       std::min<int64_t>(kPanelKeys, some - key), -1);
    }
  }

  void finish(const Group& group, const AttentionResult& result) {
    for (int64_t t = 0; t < columns_ * group.heads; ++t) tiles_.finish(t, result);
  }

 private:
  // Packs the mean queries of kPoolLanes pools from `first` on, in the problem's type, and writes
  // what their dot products must reach: nothing reaches that of a pool without rows.
  template <class Anchor>
  void pool(const Group& group, int64_t head, const AttentionRegion& region, const StripeRule& rule,
            int64_t first, const Anchor& anchor_of, float* thresholds) {
    means_.assign(static_cast<size_t>(kPoolLanes * p_.dim * size_of(p_.dtype)), 0);
    sums_.resize(static_cast<size_t>(p_.dim));
    const int64_t length = region.group_size / rule.pools;
    const int64_t origin = group.number * region.group_size - group.sequence->shift;
    for (int64_t u = 0; u < kPoolLanes; ++u) {
      thresholds[u] = INFINITY;
      if (first + u >= rule.pools) continue;
      const int64_t begin = std::max(group.first_row, origin + (first + u) * length);
      const int64_t end = std::min(group.end_row, origin + (first + u + 1) * length);
      if (begin >= end) continue;
      if (p_.dtype == DType::kFloat32)
        mean_row<float>(group.batch, head, begin, end, u);
      else
        mean_row<BFloat16>(group.batch, head, begin, end, u);
      double anchor = 0;
      for (int64_t r = begin; r < end; ++r) anchor += anchor_of(r);
      thresholds[u] =
          (static_cast<float>(anchor / static_cast<double>(end - begin)) - rule.theta) / p_.scale;
    }
    pool_words_.reserve(shape_.depth * kPoolLanes);
    const AttentionRows view{means_.data(), p_.dim, nullptr, kPoolLanes, static_cast<int>(p_.dim)};
    shape_.kernel.pack_queries(view, shape_.padded, kPoolLanes, pool_words_.data());
  }

  template <class T>
  void mean_row(int64_t batch, int64_t head, int64_t begin, int64_t end, int64_t pool) {
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (int64_t r = begin; r < end; ++r) {
      const T* row = at<const T>(p_.q, sizeof(T), batch, head, r);
      for (int64_t d = 0; d < p_.dim; ++d) sums_[static_cast<size_t>(d)] += to_float(row[d]);
    }
    T* mean = reinterpret_cast<T*>(means_.data()) + pool * p_.dim;
    for (int64_t d = 0; d < p_.dim; ++d)
      assign(mean[d], sums_[static_cast<size_t>(d)] / static_cast<float>(end - begin));
  }

  const AttentionProblem& p_;
  const TileShape& shape_;
  Tiles tiles_;
  int64_t columns_ = 0;
  AlignedArray<uint32_t> keys_, values_, pool_words_;
  std::vector<uint8_t> keep_, means_;
  std::vector<float> sums_;
};

void check_stripes(const AttentionProblem& p, const std::vector<Sequence>& sequences,
                   const AttentionLists& stripes) {
  check_lists(p, stripes, p.keys, "stripe");
  const int64_t lists = stripes.offset_count - 1;
  const int64_t groups = p.batch ? lists / (p.batch * stripes.heads) : 0;
  for (int64_t i = 0; i < lists; ++i) {
    const int64_t begin = stripes.offsets[i], end = stripes.offsets[i + 1];
    if (begin == end) continue;
    const Sequence& one = sequences[static_cast<size_t>(i / (groups * stripes.heads))];
    const int64_t bound = one.start + std::min(i % groups * stripes.group_size, one.length);
    check(stripes.items[begin] >= one.start && stripes.items[end - 1] < bound, "stripes ",
          stripes.items[begin], " to ", stripes.items[end - 1], " of group ", i % groups,
          " must lie in [", one.start, ", ", bound,
          "): in their sequence and before the group's first row");
  }
}

size_t list_number(const AttentionProblem& p, const Group& group, int64_t size) {
  const int64_t groups = ceil_div(p.q_offset + p.rows, size);
  return static_cast<size_t>((group.batch * p.heads + group.first_head) / group.heads * groups +
                             group.number);
}

template <class Work>
void over_groups(const AttentionProblem& p, const TileShape& shape,
                 const std::vector<Group>& groups, const Work& work) {
  take_in_turns(static_cast<int64_t>(groups.size()), attention_threads(p), [&] {
    return [&, worker = GroupWorker(p, shape)](int64_t i) mutable {
      work(worker, groups[static_cast<size_t>(i)]);
    };
  });
}

StripeLists empty_lists(const AttentionProblem& p, const AttentionRegion& region,
                        const StripeRule& rule) {
  const int64_t heads = rule.share_kv ? p.key_heads : p.heads;
  return StripeLists(
      static_cast<size_t>(p.batch * heads * ceil_div(p.q_offset + p.rows, region.group_size)));
}

}  // namespace

void anchor_state(const AttentionProblem& problem, const AttentionRegion& region,
                  const AttentionResult& result) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  check_region(region);
  const TileShape shape(problem);
  clear_other_rows(problem, sequences, result);
  const PackedKeys packed(problem, sequences, shape, true);
  over_groups(problem, shape, groups_of(problem, sequences, region.group_size, 1),
              [&](GroupWorker& worker, const Group& group) {
                worker.begin(group);
                worker.attend_region(group, region, packed);
                worker.finish(group, result);
              });
}

StripeLists identify_stripes(const AttentionProblem& problem, const float* anchor,
                             const AttentionRegion& region, const StripeRule& rule) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  check_region(region);
  check_rule(region, rule);
  const TileShape shape(problem);
  const PackedKeys packed(problem, sequences, shape, false);
  StripeLists lists = empty_lists(problem, region, rule);
  const int64_t together = rule.share_kv ? problem.heads / problem.key_heads : 1;
  over_groups(problem, shape, groups_of(problem, sequences, region.group_size, together),
              [&](GroupWorker& worker, const Group& group) {
                const auto anchor_of = [&](int64_t h, int64_t row) {
                  const int64_t head = group.batch * problem.heads + group.first_head + h;
                  return anchor[head * problem.rows + row];
                };
                worker.find(group, region, rule, packed, anchor_of,
                            lists[list_number(problem, group, region.group_size)]);
              });
  return lists;
}

void stripe_attention(const AttentionProblem& problem, const AttentionLists& stripes,
                      const AttentionResult* before, const AttentionResult& result) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  check_stripes(problem, sequences, stripes);
  const TileShape shape(problem);
  clear_other_rows(problem, sequences, result);
  const int64_t share = problem.heads / stripes.heads;
  const int64_t groups =
      problem.batch ? (stripes.offset_count - 1) / (problem.batch * stripes.heads) : 0;
  const auto list_of = [&](const Group& group) {
    return stripes.offsets + (group.batch * stripes.heads + group.first_head / share) * groups +
           group.number;
  };
  std::vector<Group> tasks = groups_of(problem, sequences, stripes.group_size, 1);
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Group& a, const Group& b) {
    return list_of(a)[1] - list_of(a)[0] > list_of(b)[1] - list_of(b)[0];
  });
  over_groups(problem, shape, tasks, [&](GroupWorker& worker, const Group& group) {
    const int64_t* list = list_of(group);
    worker.begin(group);
    if (before) worker.resume(*before);
    worker.attend_stripes(group, stripes.items + list[0], list[1] - list[0]);
    worker.finish(group, result);
  });
}

StripeLists anchor_attention(const AttentionProblem& problem, const AttentionRegion& region,
                             const StripeRule& rule, const AttentionResult& result) {
  const std::vector<Sequence> sequences = sequences_of(problem);
  check_region(region);
  check_rule(region, rule);
  const TileShape shape(problem);
  clear_other_rows(problem, sequences, result);
  const PackedKeys packed(problem, sequences, shape, true);
  StripeLists lists = empty_lists(problem, region, rule);
  const int64_t together = rule.share_kv ? problem.heads / problem.key_heads : 1;
  over_groups(problem, shape, groups_of(problem, sequences, region.group_size, together),
              [&](GroupWorker& worker, const Group& group) {
                std::vector<int32_t>& list = lists[list_number(problem, group, region.group_size)];
                worker.begin(group);
                worker.attend_region(group, region, packed);
                worker.find(
                    group, region, rule, packed,
                    [&](int64_t h, int64_t row) { return worker.maximum(group, h, row); }, list);
                worker.attend_stripes(group, list.data(), static_cast<int64_t>(list.size()));
                worker.finish(group, result);
              });
  return lists;
}

}  // namespace pysparse
