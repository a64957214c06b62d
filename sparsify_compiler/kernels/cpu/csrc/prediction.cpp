// The selection of single keys by predicted scores, as kernels/prediction/__init__.py defines it.
//
// Threads first write the keys of some heads as vector lanes, then take tiles of query groups of one head. The scores
// of a tile are products with these keys,
//
//     score[group][key] = scale * sum over r of query[group][r] * keys[r][key] + bias[key]
//
// A group of several queries has one row, the sum of their softmax. Rows stay in cache while each is searched: a
// bisection over the integers that rise with floats finds the largest threshold that enough scores reach, by counting.
// A last pass lists the keys by rising index. Nothing is sorted, and no result depends on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>

#include "check.h"
#include "interface.h"
#include "phases.h"
#include "product.h"

namespace {

constexpr int kVecs = kRegisters == 32 ? 4 : 2;
constexpr int kStripLanes = kVecs * kLanes;
constexpr int kTileRows = 24;  // rows at a time, of which kSums / kVecs = 6 have their sums in registers
constexpr int64_t kStripsAtOnce = 8;  // of keys that a thread writes as lanes
constexpr int64_t kMostLanes = 8 << 20;  // bytes of keys as lanes that are in memory at a time, if they are of several heads
constexpr int64_t kTileQueries = 96;  // about the number of queries in the groups of a tile
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();

using IntVec = int32_t __attribute__((vector_size(4 * kLanes)));

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Integers in the order of floats: x < y if image(x) < image(y), and both zeros are 0.
int32_t image(float x) {
  const int32_t bits = bit_cast<int32_t>(x);
  return bits < 0 ? INT32_MIN - bits : bits;
}

float of_image(int32_t i) { return bit_cast<float>(i < 0 ? INT32_MIN - i : i); }

IntVec lane_numbers() {
  IntVec numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// Writes the numbers whose lane is selected (all bits set, not none) side by side, and returns their number. `to` has
// room for all lanes.
int64_t append(int32_t* to, IntVec numbers, IntVec chosen) {
#if defined(__AVX512F__)
  const __mmask16 mask = _mm512_test_epi32_mask((__m512i)chosen, (__m512i)chosen);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(mask, (__m512i)numbers));
  return __builtin_popcount(mask);
#else
  int64_t count = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    to[count] = numbers[lane];
    count -= chosen[lane];
  }
  return count;
#endif
}

// The keys of some heads as lanes, [head][strip][word][vector]. Lanes without a key are hidden, so they may hold
// anything.
template <class Math, class T>
class KeyLanes {
 public:
  explicit KeyLanes(const TopK& problem)
      : p_(problem),
        words_(ceil_div(p_.rank, Math::kPerWord)),
        strips_(ceil_div(p_.tokens, kStripLanes)),
        heads_at_once_(std::max<int64_t>(std::min(most_heads(), p_.batch * p_.kv_heads), 1)),
        keys_(new Vec[heads_at_once_ * vecs_of_head()]) {}

  int64_t words() const { return words_; }
  int64_t strips() const { return strips_; }
  int64_t heads_at_once() const { return heads_at_once_; }
  int64_t items_of_head() const { return ceil_div(strips_, kStripsAtOnce); }
  const Vec* strip(int64_t head, int64_t strip) const {
    return keys_.get() + head % heads_at_once_ * vecs_of_head() + strip * words_ * kVecs;
  }

  // Some strips of a head, which is numbered with its batch.
  void load(int64_t head, int64_t item) {
    const int64_t begin = item * kStripsAtOnce * kStripLanes;
    const int64_t count = std::min<int64_t>(kStripsAtOnce * kStripLanes, p_.tokens - begin);
    const auto row_of = [&](int64_t i) { return p_.key.at<const T>(head / p_.kv_heads, head % p_.kv_heads, begin + i); };
    const std::unique_ptr<float[]> words(new float[words_]);
    for_each_row(count, p_.rank, row_of, [&](int64_t i) {
      Math::pack_row(row_of(i), p_.rank, words.get());
      float* lanes = reinterpret_cast<float*>(const_cast<Vec*>(strip(head, (begin + i) / kStripLanes))) + i % kStripLanes;
      for (int64_t w = 0; w < words_; ++w) lanes[w * kStripLanes] = words[w];
    });
  }

 private:
  int64_t vecs_of_head() const { return strips_ * words_ * kVecs; }
  int64_t most_heads() const { return kMostLanes / int64_t(sizeof(Vec)) / std::max<int64_t>(vecs_of_head(), 1); }

  const TopK& p_;
  const int64_t words_, strips_, heads_at_once_;
  std::unique_ptr<Vec[]> keys_;
};

// Selects for one tile of groups at a time, on its own scratch memory.
template <class Math, class T>
class Chooser {
 public:
  Chooser(const TopK& problem, const KeyLanes<Math, T>& keys)
      : p_(problem),
        keys_(keys),
        bounds_(p_.q_bounds.at<const int32_t>(0, 0)),
        most_(std::min(p_.width, p_.tokens)),
        strips_(keys.strips()),
        vecs_(strips_ * kVecs),
        queries_(new float[kTileRows * keys.words()]),
        scores_(new Vec[kTileRows * vecs_]),
        together_(new Vec[bounds_ ? tile_groups(p_) * vecs_ : 0]),
        chosen_(new int32_t[most_ + kLanes]) {}

  static int64_t tile_groups(const TopK& p) {
    if (!p.q_bounds.data) return kTileRows;
    return std::clamp<int64_t>(kTileQueries * p.groups / std::max<int64_t>(p.queries, 1), 1, kTileRows);
  }

  void run(int64_t b, int64_t h, int64_t first) {
    const int64_t count = std::min(tile_groups(p_), p_.groups - first);
    const int64_t wanted = std::clamp<int64_t>(*p_.budget.at<const int32_t>(b, h), 0, most_);
    if (wanted > 0 && !bounds_) compute_scores(b, h, first, count);
    if (wanted > 0 && bounds_) add_up(b, h, first, count);
    const Vec* rows = bounds_ ? together_.get() : scores_.get();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t found = wanted > 0 ? choose(rows + i * vecs_, wanted) : 0;
      int32_t* indices = p_.kv_indices.at<int32_t>(b, h, first + i);
      std::copy_n(chosen_.get(), found, indices);
      std::fill_n(indices + found, p_.width - found, 0);
      *p_.kv_num_blocks.at<int32_t>(b, h, first + i) = found;
    }
  }

 private:
  // The rows of groups, in together_.
  void add_up(int64_t b, int64_t h, int64_t first, int64_t count) {
    const int64_t end = bounds_[first + count];
    int64_t group = first - 1;
    for (int64_t query = bounds_[first]; query < end;) {
      const int64_t some = std::min<int64_t>(kTileRows, end - query);
      compute_scores(b, h, query, some);
      for (int64_t row = 0; row < some;) {
        while (group < first || bounds_[group + 1] <= query + row) begin_group(b, h, first, ++group);
        const int64_t rows = std::min<int64_t>(some, bounds_[group + 1] - query) - row;
        add_softmax(row, rows, &together_[(group - first) * vecs_]);
        row += rows;
      }
      query += some;
    }
    while (++group < first + count) begin_group(b, h, first, group);
  }

  // An empty sum: -inf where a key is hidden or beyond the last, and everywhere if the group has no query.
  void begin_group(int64_t b, int64_t h, int64_t first, int64_t group) {
    Vec* row = &together_[(group - first) * vecs_];
    float* lanes = reinterpret_cast<float*>(row);
    const bool empty = bounds_[group] == bounds_[group + 1];
    std::fill_n(row, vecs_, splat(-kInfinity));
    if (!empty) std::fill_n(lanes, p_.tokens, 0.0f);
    if (empty || !p_.key_bias.data) return;
    const float* bias = p_.key_bias.at<const float>(b, h);
    for (int64_t i = 0; i < p_.tokens; ++i) lanes[i] = bias[i] == -kInfinity ? -kInfinity : 0.0f;
  }

  // sum += softmax of `rows` rows of scores_, which are overwritten. Hidden keys have no share and stay at -inf.
  void add_softmax(int64_t first, int64_t rows, Vec* sum) {
    Vec* scores = &scores_[first * vecs_];
    float parts[kTileRows];
    for (int64_t row = 0; row < rows; ++row) parts[row] = exponentials(scores + row * vecs_, most_of_[first + row]);
    for (int64_t i = 0; i < vecs_; ++i) {
      Vec shares = sum[i];
      for (int64_t row = 0; row < rows; ++row) shares += scores[row * vecs_ + i] * parts[row];
      sum[i] = shares;
    }
  }

  // Scores -> their exponentials up to a common factor, 0 for -inf. Returns the factor that makes their sum 1.
  float exponentials(Vec* scores, Vec most) const {
    float highest = kLowest;
    for (int lane = 0; lane < kLanes; ++lane) highest = std::max(highest, most[lane]);
    const Vec top = splat(std::min(highest, std::numeric_limits<float>::max()));
    Vec shares{};
    for (int64_t i = 0; i < vecs_; ++i) {
      scores[i] = exp2((scores[i] < top ? scores[i] - top : Vec{}) * kLog2e);
      shares += scores[i];
    }
    float total = 0;
    for (int lane = 0; lane < kLanes; ++lane) total += shares[lane];
    return total > 0 ? 1 / total : 0;
  }

  // The scores of `count` queries from the first, in scores_, and the highest of each lane, in most_of_.
  void compute_scores(int64_t b, int64_t h, int64_t first, int64_t count) {
    const int64_t kv_head = b * p_.kv_heads + h * p_.kv_heads / p_.heads, words = keys_.words();
    const float* bias = p_.key_bias.data ? p_.key_bias.at<const float>(b, h) : nullptr;
    for (int64_t i = 0; i < count; ++i) {
      Math::pack_row(p_.query.at<const T>(b, h, first + i), p_.rank, &queries_[i * words]);
    }
    std::fill_n(most_of_, kTileRows, splat(kLowest));
    for (int64_t strip = 0; strip < strips_; ++strip) {
      const int64_t begin = strip * kStripLanes, keys = std::min<int64_t>(kStripLanes, p_.tokens - begin);
      Vec biases[kVecs];
      float* lanes = reinterpret_cast<float*>(biases);
      std::fill_n(lanes, kStripLanes, -kInfinity);  // a lane without a key is hidden
      if (bias) std::copy_n(bias + begin, keys, lanes);
      else std::fill_n(lanes, keys, 0.0f);
      for_row_groups<kVecs>(count, [&](auto rows, int64_t row) {
        constexpr int Rows = rows;
        Vec sums[Rows][kVecs] = {};
        multiply<Math, Rows, kVecs>(sums, &queries_[row * words], words, 1, keys_.strip(kv_head, strip), words);
        UNROLL for (int r = 0; r < Rows; ++r) {
          UNROLL for (int v = 0; v < kVecs; ++v) {
            const Vec score = sums[r][v] * p_.scale + biases[v];
            const Vec number = score == score ? score : splat(kLowest);
            const Vec seen = biases[v] == -kInfinity ? splat(-kInfinity) : number;
            scores_[(row + r) * vecs_ + strip * kVecs + v] = seen;
            most_of_[row + r] = max(seen, most_of_[row + r]);
          }
        }
      });
    }
  }

  int64_t count(const Vec* scores, float threshold) const {
    IntVec counts[kVecs] = {};
    for (int64_t i = 0; i < vecs_; i += kVecs) {
      UNROLL for (int v = 0; v < kVecs; ++v) counts[v] -= scores[i + v] >= threshold;
    }
    int64_t sum = 0;
    for (int lane = 0; lane < kStripLanes; ++lane) sum += counts[lane / kLanes][lane % kLanes];
    return sum;
  }

  // Lists the keys of one row in chosen_, and returns their number.
  int64_t choose(const Vec* scores, int64_t wanted) {
    // `reached` scores are at `low` or above, at least as many as wanted; `beyond` are at `high` or above, fewer.
    int64_t low = image(kLowest), high = int64_t(image(kInfinity)) + 1;
    int64_t reached = count(scores, kLowest), beyond = 0;
    while (reached > wanted && high - low > 1) {
      const int64_t middle = (low + high) >> 1, found = count(scores, of_image(middle));
      if (found >= wanted) {
        low = middle, reached = found;
      } else {
        high = middle, beyond = found;
      }
    }
    const float threshold = of_image(low);
    const int64_t last = reached > wanted ? tie(scores, threshold, wanted - beyond) : p_.tokens;
    return list(scores, threshold, last);
  }

  // The n-th key with the score `threshold`.
  int64_t tie(const Vec* scores, float threshold, int64_t n) const {
    const float* score = reinterpret_cast<const float*>(scores);
    int64_t key = -1;
    while (n > 0) n -= score[++key] == threshold;
    return key;
  }

  // Keys whose score is above the threshold, or at it and their index at most `last`.
  int64_t list(const Vec* scores, float threshold, int64_t last) {
    int64_t found = 0;
    IntVec keys = lane_numbers();
    for (int64_t i = 0; i < vecs_; ++i, keys += kLanes) {
      const IntVec is_chosen =
          (scores[i] > threshold) | ((scores[i] == threshold) & (keys <= int32_t(last)));
      found += append(&chosen_[found], keys, is_chosen);
    }
    return found;
  }

  const TopK& p_;
  const KeyLanes<Math, T>& keys_;
  const int32_t* const bounds_;
  const int64_t most_, strips_, vecs_;
  std::unique_ptr<float[]> queries_;
  std::unique_ptr<Vec[]> scores_, together_;
  std::unique_ptr<int32_t[]> chosen_;
  Vec most_of_[kTileRows];
};

template <class Math, class T>
bool run_top_k(const TopK& p) {
  if (!bounds_fit(p.q_bounds, p.batch, p.heads, p.groups, p.queries)) return false;
  KeyLanes<Math, T> keys(p);
  const int64_t tile = Chooser<Math, T>::tile_groups(p), tiles = ceil_div(p.groups, tile);
  const int64_t kv_heads = p.batch * p.kv_heads, copies = p.heads / p.kv_heads, at_once = keys.heads_at_once();
  Phases phases(2 * ceil_div(kv_heads, at_once));
#pragma omp parallel num_threads(p.threads)
  {
    Chooser<Math, T> chooser(p, keys);
    for (int64_t first = 0, phase = 0; first < kv_heads; first += at_once) {
      const int64_t some = std::min(at_once, kv_heads - first), items = keys.items_of_head();
      phases.run(phase++, some * items, [&](int64_t i) { keys.load(first + i / items, i % items); });
      phases.run(phase++, some * copies * tiles, [&](int64_t i) {
        const int64_t head = first * copies + i / tiles;  // of the queries, numbered with its batch
        chooser.run(head / p.heads, head % p.heads, i % tiles * tile);
      });
    }
  }
  return true;
}

#if defined(__AVX512BF16__)
using BFloat16Math = Bf16Pairs;
#else
using BFloat16Math = Fp32;
#endif

}  // namespace

extern "C" bool sparsify_top_k_keys(const TopK* problem) {
  switch (problem->dtype) {
    case kFloat32: return run_top_k<Fp32, float>(*problem);
    case kFloat16: return run_top_k<Fp32, Half>(*problem);
    case kBFloat16: return run_top_k<BFloat16Math, BFloat16>(*problem);
  }
  return false;
}
