// Products and softmax for a few queries, which would leave most lanes of a strip (strips.h) empty. Here channels are
// lanes, and scores have keys as lanes. Keys and values are not copied.

#pragma once

#include <utility>

#include "strips.h"

constexpr int kMostFewQueries = InVectors<Fp32>::kFewQueries;

// kLanes elements as floats.
template <class T>
ALWAYS_INLINE Vec load_channels(const T* row) {
  Vec channels;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&channels, row, sizeof(channels));
  } else {
    UNROLL for (int i = 0; i < kLanes; ++i) reinterpret_cast<float*>(&channels)[i] = to_float(row[i]);
  }
  return channels;
}

// Elements before `there`, and zeros.
template <class T>
Vec load_channels(const T* row, int there) {
  Vec channels{};
  for (int i = 0; i < there; ++i) reinterpret_cast<float*>(&channels)[i] = to_float(row[i]);
  return channels;
}

// A row of `dim` elements as whole vectors.
template <class T>
void load_row(const T* row, int64_t dim, Vec* out) {
  for (int64_t d = 0; d < dim; d += kLanes) *out++ = load_channels(row + d, std::min<int64_t>(kLanes, dim - d));
}

// Lane i: the sum of the elements i and i ^ Step of `left`, or of `right` if i has the bit Step.
template <int Step, int... Lane>
ALWAYS_INLINE Vec fold(Vec left, Vec right, std::integer_sequence<int, Lane...>) {
  constexpr auto there = [](int lane) { return lane & Step ? kLanes : 0; };
#if defined(__clang__)
  return __builtin_shufflevector(left, right, (there(Lane) + Lane)...) +
         __builtin_shufflevector(left, right, (there(Lane) + (Lane ^ Step))...);
#else
  return __builtin_shuffle(left, right, UintVec{uint32_t(there(Lane) + Lane)...}) +
         __builtin_shuffle(left, right, UintVec{uint32_t(there(Lane) + (Lane ^ Step))...});
#endif
}

// Lane i: the sum of all lanes of rows[i].
template <int Step = 1>
ALWAYS_INLINE Vec sums_of_lanes(Vec* rows) {
  if constexpr (Step == kLanes) {
    return rows[0];
  } else {
    UNROLL for (int i = 0; i < kLanes / Step / 2; ++i) {
      rows[i] = fold<Step>(rows[2 * i], rows[2 * i + 1], std::make_integer_sequence<int, kLanes>());
    }
    return sums_of_lanes<2 * Step>(rows);
  }
}

// The largest of `count` lanes; NaN does not count.
inline float largest_lane(const Vec* vecs, int count) {
  Vec top = splat(-kInfinity);
  for (int v = 0; v < vecs_for(count); ++v) top = max(vecs[v], top);
  float most = -kInfinity;
  for (int i = 0; i < kLanes; ++i) most = std::max(most, top[i]);
  return most;
}

inline float sum_of_lanes(Vec x) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

// In place, products of a query with `count` keys -> scores. A bias of -inf hides its key.
inline void add_bias(Vec* scores, float scale, const float* bias, int count) {
  for (int v = 0; v < vecs_for(count); ++v) {
    const Vec added = load_channels(bias + v * kLanes), score = scores[v] * scale + added;
    scores[v] = added == -kInfinity ? added : score;
  }
}

// Softmax of the scores of one query so far, as in a strip.
struct RowSoftmax {
  float max = -kInfinity, sum = 0.0f;

  float base() const { return max == -kInfinity ? 0.0f : max; }

  // In place, scores -> weights exp2(score - max). Returns the factor for all earlier sums.
  float weigh(Vec* scores, int count) {
    const float before = max;
    max = std::min(std::max(max, largest_lane(scores, count)), kLargest);
    Vec added{};
    for (int v = 0; v < vecs_for(count); ++v) {
      scores[v] = exp2(scores[v] - base());
      added += scores[v];
    }
    const float decay = std::exp2(before - base());
    sum = sum * decay + sum_of_lanes(added);
    return decay;
  }
};

// The rows of a chunk of keys or values, in place in memory.
template <class T, int kChunk>
struct Rows {
  const T* at[kChunk];
  int64_t dim;

  // products[i] of `query` with rows i * kLanes, ...: kLanes at a time. Rows after `count` may be anything.
  void multiply(const Vec* query, int count, Vec* products) const {
    const int whole = dim / kLanes, rest = dim % kLanes;
    for (int first = 0; first < count; first += kLanes) {
      const T* const* rows = at + first;
      Vec sums[kLanes] = {};
      for (int v = 0; v < whole; ++v) {
        UNROLL for (int i = 0; i < kLanes; ++i) sums[i] += query[v] * load_channels(rows[i] + v * kLanes);
      }
      for (int i = 0; rest && i < kLanes; ++i) {
        sums[i] += query[whole] * load_channels(rows[i] + whole * kLanes, rest);
      }
      *products++ = sums_of_lanes(sums);
    }
  }

  // out[r] += sum over i < count of weights[r * stride + i] * rows[i], for r < out_rows
  void add_to(Vec* out, int out_rows, const float* weights, int64_t stride, int count) const {
    const int whole = dim / kLanes;
    int r = 0;
    for (; out_rows - r >= 4; r += 4) add_to_group<4>(out + r * vecs_for(dim), weights + r * stride, stride, count);
    for (; r < out_rows; ++r) add_to_group<1>(out + r * vecs_for(dim), weights + r * stride, stride, count);
    if (const int rest = dim % kLanes) {
      for (r = 0; r < out_rows; ++r) {
        Vec sum{};
        for (int i = 0; i < count; ++i) {
          sum += weights[r * stride + i] * load_channels(at[i] + whole * kLanes, rest);
        }
        out[r * vecs_for(dim) + whole] += sum;
      }
    }
  }

 private:
  // The whole vectors of `Group` rows of `out`.
  template <int Group>
  void add_to_group(Vec* out, const float* weights, int64_t stride, int count) const {
    const int vecs = vecs_for(dim), whole = dim / kLanes;
    for (int v = 0; v < whole; v += kVecs) {
      with_vecs(std::min(kVecs, whole - v), [&](auto some) {
        constexpr int Vecs = some;
        Vec sums[Group][Vecs] = {};
        for (int i = 0; i < count; ++i) {
          Vec row[Vecs];
          UNROLL for (int j = 0; j < Vecs; ++j) row[j] = load_channels(at[i] + (v + j) * kLanes);
          UNROLL for (int r = 0; r < Group; ++r) {
            UNROLL for (int j = 0; j < Vecs; ++j) sums[r][j] += weights[r * stride + i] * row[j];
          }
        }
        UNROLL for (int r = 0; r < Group; ++r) {
          UNROLL for (int j = 0; j < Vecs; ++j) out[r * vecs + v + j] += sums[r][j];
        }
      });
    }
  }
};
