// One tile of query rows against one panel of keys, rows in lanes, in registers of kKeys x kVectors
// sums. Included inside a target region. `V` has the input type T and:
//   Vector, kLanes, kVectors, kKeys, kKeysPerWord
//   load, store, set (broadcast), max, add, mul, add_product(a, b, c) = a * b + c
//   load_words, broadcast_word and dot(a, b, c) = c + the products of the words' parts
//   exp2, which gives 0 for -inf and NaN for NaN
//   store_pair(even, odd, sum, words): the weights of two keys, added to the sum (kKeysPerWord 2)
//   kMarkKeys: keys at once against kPoolLanes pooled rows
//   lanes_from(n): the lanes of number n and up, all for n <= 0; select(mask, a), -inf elsewhere
//   any_above, blend, row_words, store_row, transpose

namespace pysparse {
namespace {

template <class V>
struct Tile {
  using Vector = typename V::Vector;
  using Words = typename V::Words;
  using T = typename V::T;
  static constexpr int kVectors = V::kVectors, kLanes = V::kLanes, kKeys = V::kKeys;
  static constexpr int kWidth = kVectors * kLanes, kPair = V::kKeysPerWord;
  // The reference follows a row's maximum once that is 2^8 above it: bf16 weights keep their
  // precision at any scale, and fp32 sums are far from overflow.
  static constexpr float kLag = 8.0f;
  static constexpr float kStart =
      -1e30f;  // finite: no difference of infinities, so no NaN of its own

  // scores[i][lane] of kRows keys, their pointers in `keys`; returns the maxima through `peak`.
  template <int kRows, int kColumns, bool kPeak>
  static void score(const uint32_t* queries, int width, int depth, const uint32_t* const* keys,
                    float* scores, Vector* peak) {
    Vector sums[kRows][kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[i][c] = V::set(0.0f);
#pragma GCC unroll 2
    for (int d = 0; d < depth; ++d) {
      Words q[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) q[c] = V::load_words(queries + d * width + c * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Words key = V::broadcast_word(keys[i][d]);
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) sums[i][c] = V::dot(q[c], key, sums[i][c]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        V::store(scores + i * width + c * kLanes, sums[i][c]);
        if (kPeak) peak[c] = V::max(peak[c], sums[i][c]);  // a NaN may drop out: its weight says it
      }
  }

  // Pointers of the kKeys keys from t on; past the end the last key again, which moves no maximum.
  static void key_pointers(const AttentionPanel& panel, int depth, int t, const uint32_t** keys) {
    for (int i = 0; i < kKeys; ++i)
      keys[i] = panel.keys + static_cast<int64_t>(std::min(t + i, panel.count - 1)) * depth;
  }

  // Dot products of the whole panel, -inf where a row does not see a key, and each row's largest.
  static void score_panel(const AttentionPanel& panel, float* scores, Vector* peak) {
    const int depth = panel.padded / kPair;
    const int open = std::min(panel.count, panel.diagonal + 1);  // keys that every row sees
    for (int c = 0; c < kVectors; ++c) peak[c] = V::set(-INFINITY);
    const uint32_t* keys[kKeys];
    int t = 0;
    const bool all = open >= panel.count;
    for (; all ? t < panel.count : t + kKeys <= open; t += kKeys) {
      key_pointers(panel, depth, t, keys);
      score<kKeys, kVectors, true>(panel.queries, kWidth, depth, keys, scores + t * kWidth, peak);
    }
    const int masked = t;
    for (; t < panel.count; t += kKeys) {
      key_pointers(panel, depth, t, keys);
      score<kKeys, kVectors, false>(panel.queries, kWidth, depth, keys, scores + t * kWidth, peak);
    }
    for (int key = masked; key < panel.count; ++key)
      for (int c = 0; c < kVectors; ++c) {
        float* place = scores + key * kWidth + c * kLanes;
        const auto seen = V::lanes_from(key - panel.diagonal - c * kLanes);
        const Vector score = V::select(seen, V::load(place));
        V::store(place, score);
        peak[c] = V::max(peak[c], score);
      }
    if (kPair == 2 && panel.count % 2)  // the missing half of the last word weighs nothing
      for (int c = 0; c < kVectors; ++c)
        V::store(scores + panel.count * kWidth + c * kLanes, V::set(-INFINITY));
  }

  // Raises a column's reference to its maximum where that has run ahead, and rescales what it
  // holds.
  static Vector follow(const AttentionTileState& state, int padded, float scale, int column,
                       Vector peak) {
    const Vector factor = V::set(scale);
    Vector reference = V::load(state.reference + column);
    V::store(state.maximum + column, V::max(V::load(state.maximum + column), peak));
    const auto ahead = V::above(peak, V::add(reference, V::set(kLag / scale)));
    if (V::any(ahead)) {
      const Vector raised = V::blend(ahead, peak, reference);
      // Both products are rounded as the weights' exponents are, or the two would not cancel.
      const Vector shrink =
          V::exp2(V::add(V::mul(reference, factor), V::mul(raised, V::set(-scale))));
      V::store(state.sum + column, V::mul(V::load(state.sum + column), shrink));
      V::store(state.reference + column, raised);
      for (int d = 0; d < padded; ++d) {
        float* out = state.out + d * kWidth + column;
        V::store(out, V::mul(V::load(out), shrink));
      }
      reference = raised;
    }
    return V::mul(reference, V::set(-scale));
  }

  // Weights of one column of the panel, into `words`; returns their sum added to `sum`.
  static Vector weigh_column(const float* scores, int count, float scale, Vector shift, Vector sum,
                             uint32_t* words) {
    const Vector factor = V::set(scale);
    for (int p = 0; p < (count + kPair - 1) / kPair; ++p) {
      const float* place = scores + p * kPair * kWidth;
      const Vector even = V::exp2(V::add_product(V::load(place), factor, shift));
      if constexpr (kPair == 2) {
        const Vector odd = V::exp2(V::add_product(V::load(place + kWidth), factor, shift));
        sum = V::store_pair(even, odd, sum, words + p * kWidth);
      } else {
        V::store(reinterpret_cast<float*>(words + p * kWidth), even);
        sum = V::add(sum, even);
      }
    }
    return sum;
  }

  // out[d][lane] += sum over keys of V[key][d] P[key][lane], for kKeys dimensions at a time.
  static void add_values(const AttentionPanel& panel, const uint32_t* words, int d, float* out) {
    Vector sums[kKeys][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sums[i][c] = V::load(out + i * kWidth + c * kLanes);
    const int pairs = (panel.count + kPair - 1) / kPair;
#pragma GCC unroll 2
    for (int p = 0; p < pairs; ++p) {
      Words weight[kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) weight[c] = V::load_words(words + p * kWidth + c * kLanes);
      const uint32_t* values = panel.values + p * panel.padded + d;
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const Words value = V::broadcast_word(values[i]);
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sums[i][c] = V::dot(weight[c], value, sums[i][c]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) V::store(out + i * kWidth + c * kLanes, sums[i][c]);
  }

  static void add_panel(const AttentionPanel& panel, const AttentionTileState& state,
                        float* scratch) {
    Vector peak[kVectors];
    score_panel(panel, scratch, peak);
    auto* words = reinterpret_cast<uint32_t*>(scratch + kPanelKeys * kWidth);
    for (int c = 0; c < kVectors; ++c) {
      const int column = c * kLanes;
      const Vector shift = follow(state, panel.padded, panel.scale, column, peak[c]);
      V::store(state.sum + column, weigh_column(scratch + column, panel.count, panel.scale, shift,
                                                V::load(state.sum + column), words + column));
    }
    for (int d = 0; d < panel.padded; d += kKeys)
      add_values(panel, words, d, state.out + d * kWidth);
  }

  static void weigh_panel(const AttentionPanel& panel, float* maximum, float* sum, float* scratch) {
    Vector peak[kVectors];
    score_panel(panel, scratch, peak);
    const Vector factor = V::set(panel.scale), start = V::set(kStart);
    for (int c = 0; c < kVectors; ++c) {
      const int column = c * kLanes;
      const Vector shift = V::mul(V::max(peak[c], start), V::set(-panel.scale));
      Vector total = V::set(0.0f);
      for (int t = 0; t < panel.count; ++t)
        total = V::add(
            total, V::exp2(V::add_product(V::load(scratch + t * kWidth + column), factor, shift)));
      V::store(maximum + column, peak[c]);
      V::store(sum + column, total);
    }
  }

  static void mark(const uint32_t* pools, const float* thresholds, const uint32_t* keys,
                   int64_t count, int padded, uint8_t* keep) {
    constexpr int kColumns = kPoolLanes / kLanes, kRows = V::kMarkKeys, kAhead = 3 * kRows;
    const int depth = padded / kPair;
    alignas(64) float scores[kRows * kPoolLanes];
    Vector limits[kColumns];
    for (int c = 0; c < kColumns; ++c) limits[c] = V::load_unaligned(thresholds + c * kLanes);
    for (int64_t t = 0; t < count; t += kRows) {
      const uint32_t* rows[kRows];
      for (int i = 0; i < kRows; ++i) rows[i] = keys + std::min<int64_t>(t + i, count - 1) * depth;
      if (t + kAhead + kRows <= count)  // kRows streams at once are more than the hardware follows
        for (int word = 0; word < kRows * depth; word += 16)
          __builtin_prefetch(keys + (t + kAhead) * depth + word);
      score<kRows, kColumns, false>(pools, kPoolLanes, depth, rows, scores, nullptr);
      const int live = static_cast<int>(std::min<int64_t>(kRows, count - t));
      for (int i = 0; i < live; ++i) {
        bool reached = false;
        for (int c = 0; c < kColumns; ++c)
          reached |= V::any(V::not_below(V::load(scores + i * kPoolLanes + c * kLanes), limits[c]));
        keep[t + i] |= static_cast<uint8_t>(reached);
      }
    }
  }

  static const T* row(const AttentionRows& rows, int i) {
    const int64_t number = rows.index ? rows.index[i] : i;
    return static_cast<const T*>(rows.first) + number * rows.stride;
  }

  static void pack_queries(const AttentionRows& rows, int padded, int width, uint32_t* words) {
    const int depth = padded / kPair;
    for (int first = 0; first < width; first += kLanes)
      for (int d = 0; d < depth; d += kLanes) {
        Words block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = first + i < rows.count
                         ? V::row_words(row(rows, first + i) + d * kPair, rows.dim - d * kPair)
                         : V::no_words();
        V::transpose(block);
        for (int i = 0; i < std::min(kLanes, depth - d); ++i)
          V::store_words(words + (d + i) * width + first, block[i], kLanes);
      }
  }

  static void pack_keys(const AttentionRows& rows, int padded, uint32_t* words) {
    const int depth = padded / kPair;
    for (int i = 0; i < rows.count; ++i) {
      prefetch(rows, i);
      const T* source = row(rows, i);
      for (int d = 0; d < depth; d += kLanes)
        V::store_words(words + static_cast<int64_t>(i) * depth + d,
                       V::row_words(source + d * kPair, rows.dim - d * kPair), depth - d);
    }
  }

  static void pack_values(const AttentionRows& rows, int padded, uint32_t* words) {
    for (int i = 0; i < rows.count; i += kPair) {
      prefetch(rows, i);
      if constexpr (kPair == 2) {
        prefetch(rows, i + 1);
        V::interleave(row(rows, i), i + 1 < rows.count ? row(rows, i + 1) : nullptr, rows.dim,
                      padded, words + static_cast<int64_t>(i / 2) * padded);
      } else {
        for (int d = 0; d < padded; d += kLanes)
          V::store_words(words + static_cast<int64_t>(i) * padded + d,
                         V::row_words(row(rows, i) + d, rows.dim - d), padded - d);
      }
    }
  }

  // Chosen rows lie apart: the hardware does not foresee them.
  static void prefetch(const AttentionRows& rows, int i) {
    constexpr int kAhead = 8;
    if (!rows.index || i + kAhead >= rows.count) return;
    const char* ahead = reinterpret_cast<const char*>(row(rows, i + kAhead));
    for (size_t byte = 0; byte < rows.dim * sizeof(T); byte += 64) __builtin_prefetch(ahead + byte);
  }

  static void store(const AttentionTileState& state, int rows, int dim, bool as_float, void* out,
                    int64_t stride) {
    for (int c = 0; c < kVectors && c * kLanes < rows; ++c) {
      const Vector inverse = V::inverse(V::load(state.sum + c * kLanes));
      for (int d = 0; d < dim; d += kLanes) {
        Words block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] =
              d + i < dim
                  ? V::as_words(V::mul(inverse, V::load(state.out + (d + i) * kWidth + c * kLanes)))
                  : V::no_words();
        V::transpose(block);
        for (int i = 0; i < std::min(kLanes, rows - c * kLanes); ++i) {
          const int64_t place = (c * kLanes + i) * stride + d;
          if (as_float)
            V::store_row(static_cast<float*>(out) + place, V::as_vector(block[i]), dim - d);
          else
            V::store_row(static_cast<T*>(out) + place, V::as_vector(block[i]), dim - d);
        }
      }
    }
  }

  static void load(const float* out, int64_t stride, int rows, int dim, int padded,
                   const AttentionTileState& state) {
    for (int c = 0; c < kVectors; ++c) {
      const Vector total = V::load(state.sum + c * kLanes);
      for (int d = 0; d < padded; d += kLanes) {
        Words block[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int lane = c * kLanes + i;
          block[i] = lane < rows ? V::float_words(out + lane * stride + d, dim - d) : V::no_words();
        }
        V::transpose(block);
        for (int i = 0; i < std::min(kLanes, padded - d); ++i)
          V::store(state.out + (d + i) * kWidth + c * kLanes,
                   V::mul(total, V::as_vector(block[i])));
      }
    }
  }

  static constexpr AttentionTile::Kernel kernel() {
    return {kWidth,    kPair,       pack_queries, pack_keys, pack_values,
            add_panel, weigh_panel, mark,         store,     load};
  }
};

}  // namespace
}  // namespace pysparse
