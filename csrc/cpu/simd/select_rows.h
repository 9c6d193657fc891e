// The value of a given rank by halving the interval it lies in, for any vector width. Included
// inside a target region; `V` is the vector type of one instruction set:
//   kLanes, Keys                      a register of 32-bit keys
//   load(const T*, const float*, int) keys of so many weights, kLastKey beyond; adds to `damaged`
//   less(Keys, Keys), equal(...)      a bit a lane
//   compress(...)                     optional: kCompress says whether it is there

namespace pysparse {
namespace {

struct Threshold {
  int32_t last;  // keys below it are pruned,
  int64_t ties;  // and the first so many that are equal to it
};

template <class V>
int64_t count_below(const int32_t* keys, int64_t size, int32_t pivot) {
  const auto bound = V::broadcast(pivot);
  int64_t below = 0;
  for (int64_t i = 0; i < size; i += V::kLanes)
    below += __builtin_popcount(V::less(V::load_keys(keys + i), bound));
  return below;
}

// Of `size` keys, padding of kLastKey included, `live` are real and lie in [low, high]; the
// threshold is the one of 0-based rank count - 1. Stops as soon as `count` keys lie below a pivot.
template <class V>
Threshold find_threshold(const int32_t* keys, int32_t* pool, int64_t size, int64_t live,
                         int64_t count, int64_t low, int64_t high) {
  const int32_t* from = keys;
  int64_t gone = 0;                         // keys that are no longer looked at, all below `low`
  int64_t below_low = 0, below_end = live;  // keys below `low`, and not above `high`
  while (low < high) {
    const int64_t pivot = low + (high - low + 1) / 2;
    const int64_t below = gone + count_below<V>(from, size, static_cast<int32_t>(pivot));
    if (below == count) return {static_cast<int32_t>(pivot), 0};
    if (below > count) {
      high = pivot - 1;
      below_end = below;
    } else {
      low = pivot;
      below_low = below;
    }
    if constexpr (V::kCompress) {
      if (size <= 2 * V::kLanes || below_end - below_low > size / 4) continue;
      size = V::compress(from, size, static_cast<int32_t>(low), static_cast<int32_t>(high), pool);
      from = pool;
      gone = below_low;
    }
  }
  return {static_cast<int32_t>(low), count - below_low};
}

// Writes keep bytes and weights of one row; ties go to the lower columns.
template <class V, class T>
void finish_row(const T* weight, const int32_t* keys, int64_t cols, Threshold threshold,
                uint8_t* keep, T* pruned) {
  const auto last = V::broadcast(threshold.last);
  int64_t ties = threshold.ties;
  for (int64_t c = 0; c < cols; c += V::kLanes) {
    V::prefetch(weight + cols + cols / 2 + c / 2);
    const auto row = V::load_keys(keys + c);
    uint32_t gone = V::less(row, last);
    if (ties > 0) {
      const uint32_t equal = V::equal(row, last);
      const uint32_t wanted = ties >= V::kLanes ? ~0u : (1u << ties) - 1;
      const uint32_t first = _pdep_u32(wanted, equal);
      gone |= first;
      ties -= __builtin_popcount(first);
    }
    V::write(~gone, weight + c, std::min<int64_t>(V::kLanes, cols - c), keep + c,
             pruned ? pruned + c : nullptr);
  }
}

template <class V, class T>
int64_t select_rows_of(const ScoredView& view, int64_t count, int64_t begin, int64_t end,
                       int32_t* keys, const Selection& out) {
  int64_t damaged = 0;
  const int64_t padded = RowSelect::padded(view.cols);
  for (int64_t r = begin; r < end; ++r) {
    const T* weight = static_cast<const T*>(view.weight) + r * view.cols;
    auto least = V::broadcast(kLastKey), most = V::broadcast(INT32_MIN);
    for (int64_t c = 0; c < view.cols; c += V::kLanes) {
      const int64_t live = std::min<int64_t>(V::kLanes, view.cols - c);
      V::prefetch(weight + view.cols + c / 2);
      const auto row = V::score(weight + c, view.scale ? view.scale + c : nullptr, live, &damaged);
      V::store_keys(keys + c, row.padded);
      least = V::min(least, row.padded);
      most = V::max(most, row.bounded);
    }
    for (int64_t c = (view.cols + V::kLanes - 1) / V::kLanes * V::kLanes; c < padded;
         c += V::kLanes)
      V::store_keys(keys + c, V::broadcast(kLastKey));
    Threshold threshold{INT32_MIN, 0};
    if (count == view.cols)
      threshold = {kLastKey, 0};
    else if (count > 0)
      threshold = find_threshold<V>(keys, keys + padded, padded, view.cols, count,
                                    V::reduce_min(least), V::reduce_max(most));
    finish_row<V, T>(weight, keys, view.cols, threshold, out.keep + r * view.cols,
                     out.pruned ? static_cast<T*>(out.pruned) + r * view.cols : nullptr);
  }
  return damaged;
}

}  // namespace
}  // namespace pysparse
