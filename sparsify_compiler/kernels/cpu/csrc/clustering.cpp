// Semantic clusters on the CPU: k-means, the order of tokens by label, and the choice of key clusters.
//
// The nearest centroid c of a point x is the one with the largest x.c - |c|^2 / 2. Centroids are lanes: a strip is as
// many of them as kVecs vectors hold. Points enter the products one broadcast word at a time, in their layout in
// memory. Each point keeps the best score of every lane, with the number of its vector. So lanes are compared once per
// point, and nothing of size tokens x clusters is stored:
//
//     score[point][centroid] = bias[centroid] + sum over d of points[point][d] * centroids[d][centroid]
//
// The mean m of all centroids changes no distance, but rounding could lose the differences next to it. With d = c - m,
// rounded to the type of the products, the score x.d - d.(d / 2 + m) is exact for the centroid m + d. So points need no
// shift, and rounding costs a share of a centroid's distance to m, not to zero.
//
// Sums of points run over tokens sorted by label, in double and in the order of the tokens, so no result depends on the
// number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "interface.h"
#include "phases.h"
#include "product.h"

namespace {

constexpr int kVecs = kRegisters == 32 ? 4 : 2;
constexpr int kStripLanes = kVecs * kLanes;
constexpr int kTilePoints = 96;
constexpr int kClustersAtOnce = 16;  // clusters whose means one thread takes at a time
constexpr int kRowsAhead = 8;        // rows between the one prefetched and the one read
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

float largest_lane(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float largest = x[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, x[lane]);
  return largest;
#endif
}

uint32_t smallest_lane(UintVec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_min_epu32((__m512i)x);
#else
  uint32_t smallest = x[0];
  for (int lane = 1; lane < kLanes; ++lane) smallest = std::min(smallest, x[lane]);
  return smallest;
#endif
}

UintVec lane_numbers() {
  UintVec numbers;
  for (int lane = 0; lane < kLanes; ++lane) numbers[lane] = lane;
  return numbers;
}

// ---- The order of tokens by label ------------------------------------------------------------------------

// A stable counting sort of the tokens of one head. bounds[c + 1] first holds the size of cluster c, then the place of
// its next token, and in the end the place after its last token.
void sort_tokens(const int32_t* labels, int64_t stride, int64_t tokens, int64_t clusters, int32_t* order,
                 int32_t* bounds) {
  std::fill_n(bounds, clusters + 1, 0);
  for (int64_t t = 0; t < tokens; ++t) ++bounds[labels[t * stride] + 1];
  int32_t place = 0;
  for (int64_t c = 0; c < clusters; ++c) place += std::exchange(bounds[c + 1], place);
  for (int64_t t = 0; t < tokens; ++t) order[bounds[labels[t * stride] + 1]++] = t;
}

// ---- K-means ---------------------------------------------------------------------------------------------

// The centroids of one head as lanes, [strip][words][vector], and their biases.
template <class Math>
class Lanes {
 public:
  // The type of a word's elements in the products.
  using Rounded = std::conditional_t<Math::kPerWord == 2, BFloat16, float>;

  Lanes(int64_t clusters, int64_t head_dim)
      : clusters_(clusters),
        head_dim_(head_dim),
        words_((head_dim + Math::kPerWord - 1) / Math::kPerWord),
        columns_(new Vec[strips() * words_ * kVecs]),
        bias_(new Vec[strips() * kVecs]) {}

  int64_t strips() const { return ceil_div(clusters_, kStripLanes); }
  int64_t words() const { return words_; }
  int vecs(int64_t strip) const {
    return ceil_div(std::min<int64_t>(kStripLanes, clusters_ - strip * kStripLanes), kLanes);
  }
  const Vec* columns(int64_t strip) const { return columns_.get() + strip * words_ * kVecs; }
  const Vec* bias(int64_t strip) const { return bias_.get() + strip * kVecs; }

  void load(const float* centroids) {
    const std::vector<float> common = mean(centroids);
    std::vector<Rounded> row(head_dim_);
    std::vector<float> packed(words_);
    std::fill_n(columns_.get(), strips() * words_ * kVecs, Vec{});
    std::fill_n(bias_.get(), strips() * kVecs, splat(-kInfinity));  // a lane without a centroid is never best
    for (int64_t c = 0; c < clusters_; ++c) {
      float bias = 0.0f;
      for (int64_t d = 0; d < head_dim_; ++d) {
        row[d] = from_float<Rounded>(centroids[c * head_dim_ + d] - common[d]);
        const float rounded = to_float(row[d]);
        bias -= rounded * (0.5f * rounded + common[d]);
      }
      Math::pack_row(row.data(), head_dim_, packed.data());
      const int64_t strip = c / kStripLanes, lane = c % kStripLanes, width = vecs(strip) * kLanes;
      float* column = reinterpret_cast<float*>(columns_.get() + strip * words_ * kVecs) + lane;
      for (int64_t i = 0; i < words_; ++i) column[i * width] = packed[i];
      reinterpret_cast<float*>(bias_.get())[c] = bias;
    }
  }

 private:
  // The mean of all centroids, 0 where it is not finite: any vector is right here.
  std::vector<float> mean(const float* centroids) const {
    std::vector<double> sums(head_dim_);
    for (int64_t c = 0; c < clusters_; ++c) {
      for (int64_t d = 0; d < head_dim_; ++d) sums[d] += centroids[c * head_dim_ + d];
    }
    std::vector<float> mean(head_dim_);
    for (int64_t d = 0; d < head_dim_; ++d) {
      mean[d] = std::isfinite(sums[d]) ? static_cast<float>(sums[d] / clusters_) : 0.0f;
    }
    return mean;
  }

  const int64_t clusters_, head_dim_, words_;
  std::unique_ptr<Vec[]> columns_, bias_;
};

// Finds the nearest centroids of a tile of points, on its own scratch memory.
template <class Math, class T>
class Assigner {
 public:
  Assigner(const KMeans& problem, const std::vector<Lanes<Math>>& lanes)
      : p_(problem), lanes_(lanes), words_(new float[kTilePoints * lanes[0].words()]) {}

  void run(int64_t b, int64_t h, int64_t first) {
    const Lanes<Math>& lanes = lanes_[b * p_.heads + h];
    const int64_t count = std::min<int64_t>(kTilePoints, p_.tokens - first), words = lanes.words();
    for (int64_t i = 0; i < count; ++i) {
      Math::pack_row(p_.points.at<const T>(b, h, first + i), p_.head_dim, words_.get() + i * words);
    }
    std::fill_n(best_, count, splat(-kInfinity));
    std::fill_n(best_vec_, count, UintVec{});
    for (int64_t strip = 0; strip < lanes.strips(); ++strip) {
      switch (lanes.vecs(strip)) {
        case 1: compare<1>(count, lanes, strip); break;
        case 2: compare<2>(count, lanes, strip); break;
        case 3: compare<std::min(3, kVecs)>(count, lanes, strip); break;
        default: compare<kVecs>(count, lanes, strip);
      }
    }
    for (int64_t i = 0; i < count; ++i) *p_.labels.at<int32_t>(b, h, first + i) = nearest(i);
  }

 private:
  template <int Vecs>
  void compare(int64_t points, const Lanes<Math>& lanes, int64_t strip) {
    const int64_t words = lanes.words();
    const Vec* bias = lanes.bias(strip);
    for_row_groups<Vecs>(points, [&](auto rows, int64_t first) {
      constexpr int Rows = rows;
      Vec sums[Rows][Vecs];
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) sums[r][v] = bias[v];
      }
      multiply<Math, Rows, Vecs>(sums, words_.get() + first * words, words, 1, lanes.columns(strip), words);
      UNROLL for (int r = 0; r < Rows; ++r) {
        Vec best = best_[first + r];
        UintVec best_vec = best_vec_[first + r];
        UNROLL for (int v = 0; v < Vecs; ++v) {
          const auto better = sums[r][v] > best;
          best = better ? sums[r][v] : best;
          best_vec = better ? UintVec{} + uint32_t(strip * kVecs + v) : best_vec;
        }
        best_[first + r] = best;
        best_vec_[first + r] = best_vec;
      }
    });
  }

  // The best of a point's lanes; at equal scores the lower centroid, and centroid 0 if all scores are NaN.
  int32_t nearest(int64_t point) const {
    const UintVec centroids = best_vec_[point] * kLanes + lane_numbers();
    return smallest_lane(best_[point] == largest_lane(best_[point]) ? centroids : ~UintVec{});
  }

  const KMeans& p_;
  const std::vector<Lanes<Math>>& lanes_;
  std::unique_ptr<float[]> words_;
  Vec best_[kTilePoints];
  UintVec best_vec_[kTilePoints];
};

// Moves one centroid to the mean of `count` tokens, if there are any.
template <class T>
void move_to_mean(const KMeans& p, int64_t b, int64_t h, const int32_t* tokens, int64_t count, double* sums,
                  float* centroid) {
  if (count == 0) return;
  std::fill_n(sums, p.head_dim, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    const T* ahead = p.points.at<const T>(b, h, tokens[std::min(i + kRowsAhead, count - 1)]);
    for (int64_t d = 0; d < p.head_dim; d += 64 / sizeof(T)) __builtin_prefetch(ahead + d);
    const T* row = p.points.at<const T>(b, h, tokens[i]);
    for (int64_t d = 0; d < p.head_dim; ++d) sums[d] += to_float(row[d]);
  }
  for (int64_t d = 0; d < p.head_dim; ++d) centroid[d] = static_cast<float>(sums[d] / count);
}

// The clustering of one set of points: the items of each phase, of heads that are numbered with their batches.
template <class Math, class T>
class Clustering {
 public:
  // The scratch memory of a thread.
  struct Own {
    explicit Own(const Clustering& all) : assigner(all.p_, all.lanes_), sums(all.p_.head_dim) {}
    Assigner<Math, T> assigner;
    std::vector<double> sums;
  };

  explicit Clustering(const KMeans& problem)
      : p_(problem), labels_(p_.labels.data ? 0 : heads() * p_.tokens), order_(heads() * p_.tokens),
        bounds_(heads() * (p_.clusters + 1)) {
    if (!p_.labels.data) p_.labels = {labels_.data(), p_.heads * p_.tokens, p_.tokens, 1};
    for (int64_t i = 0; i < heads(); ++i) lanes_.emplace_back(p_.clusters, p_.head_dim);
  }

  int64_t heads() const { return p_.batch * p_.heads; }
  int64_t tiles() const { return heads() * tiles_of_head(); }
  int64_t groups() const { return heads() * groups_of_head(); }

  // The centroids to start from.
  void begin(int64_t head) {
    const int64_t b = head / p_.heads, h = head % p_.heads;
    for (int64_t c = 0; c < p_.clusters; ++c) {
      float* to = p_.centroids.at<float>(b, h, c);
      if (p_.from.data) {
        std::copy_n(p_.from.at<const float>(b, h, c), p_.head_dim, to);
      } else {
        Fp32::pack_row(p_.points.at<const T>(b, h, p_.start.at<const int64_t>(0, 0)[c]), p_.head_dim, to);
      }
    }
  }

  void load(int64_t head) { lanes_[head].load(p_.centroids.at<const float>(head / p_.heads, head % p_.heads)); }

  void assign(Own& own, int64_t i) {
    const int64_t head = i / tiles_of_head();
    own.assigner.run(head / p_.heads, head % p_.heads, i % tiles_of_head() * kTilePoints);
  }

  void sort(int64_t head) {
    sort_tokens(p_.labels.at<int32_t>(head / p_.heads, head % p_.heads), p_.labels.row, p_.tokens, p_.clusters,
                order_of(head), bounds_of(head));
  }

  void move(Own& own, int64_t i) {
    const int64_t head = i / groups_of_head(), first = i % groups_of_head() * kClustersAtOnce;
    const int64_t b = head / p_.heads, h = head % p_.heads;
    const int32_t *tokens = order_of(head), *bound = bounds_of(head);
    for (int64_t c = first; c < std::min(first + kClustersAtOnce, p_.clusters); ++c) {
      move_to_mean<T>(p_, b, h, tokens + bound[c], bound[c + 1] - bound[c], own.sums.data(),
                      p_.centroids.at<float>(b, h, c));
    }
  }

  // The blocks of the sequence.
  void finish(int64_t head) {
    if (!p_.order.data) return;
    const int64_t b = head / p_.heads, h = head % p_.heads, end = p_.before + p_.tokens;
    int32_t* sizes = p_.sizes.at<int32_t>(b, h);
    const int32_t *order = order_of(head), *bound = bounds_of(head);
    for (int64_t c = 0; c < p_.clusters; ++c) sizes[c] = bound[c + 1] - bound[c];
    for (int64_t copy = h * p_.copies; copy < (h + 1) * p_.copies; ++copy) {
      int32_t *to = p_.order.at<int32_t>(b, copy), *bounds = p_.bounds.at<int32_t>(b, copy);
      for (int64_t i = 0; i < p_.before; ++i) to[i] = i;
      for (int64_t i = 0; i < p_.tokens; ++i) to[p_.before + i] = order[i] + p_.before;
      for (int64_t i = end; i < end + p_.after; ++i) to[i] = i;
      if (p_.before) *bounds++ = 0;
      for (int64_t c = 0; c <= p_.clusters; ++c) *bounds++ = bound[c] + p_.before;
      if (p_.after) *bounds++ = end + p_.after;
    }
  }

 private:
  int64_t tiles_of_head() const { return ceil_div(p_.tokens, kTilePoints); }
  int64_t groups_of_head() const { return ceil_div(p_.clusters, kClustersAtOnce); }
  int32_t* order_of(int64_t head) { return &order_[head * p_.tokens]; }
  int32_t* bounds_of(int64_t head) { return &bounds_[head * (p_.clusters + 1)]; }

  KMeans p_;
  std::vector<Lanes<Math>> lanes_;
  std::vector<int32_t> labels_, order_, bounds_;
};

template <class Math, class T>
bool run_kmeans(const KMeans& problem) {
  using Points = Clustering<Math, T>;
  std::deque<Points> all;  // an object of it does not move
  for (const KMeans* one = &problem; one; one = one->other) all.emplace_back(*one);
  Phases phases(4 * problem.iterations + 1);
#pragma omp parallel num_threads(problem.threads)
  {
    std::deque<typename Points::Own> own;
    for (const Points& points : all) own.emplace_back(points);
    int64_t phase = 0;
    // Runs body(points, the thread's own memory, item) for count(points) items of each set of points.
    auto run = [&](auto count, auto body) {
      int64_t items = 0;
      for (const Points& points : all) items += count(points);
      phases.run(phase++, items, [&](int64_t i) {
        size_t at = 0;
        for (; i >= count(all[at]); ++at) i -= count(all[at]);
        body(all[at], own[at], i);
      });
    };
    const auto heads = [](const Points& points) { return points.heads(); };
    for (int32_t iteration = 0; iteration < problem.iterations; ++iteration) {
      run(heads, [&](Points& points, auto&, int64_t i) {
        if (iteration == 0) points.begin(i);
        points.load(i);
      });
      run([](const Points& points) { return points.tiles(); },
          [](Points& points, auto& own, int64_t i) { points.assign(own, i); });
      run(heads, [](Points& points, auto&, int64_t i) { points.sort(i); });
      run([](const Points& points) { return points.groups(); },
          [](Points& points, auto& own, int64_t i) { points.move(own, i); });
    }
    run(heads, [](Points& points, auto&, int64_t i) { points.finish(i); });
  }
  return true;
}

// ---- The choice of key clusters --------------------------------------------------------------------------

// Selects for kStripLanes rows at a time, which are the lanes of its products.
class Selector {
 public:
  explicit Selector(const TopP& problem)
      : p_(problem),
        queries_(new Vec[p_.head_dim * kVecs]),
        weights_(new Vec[p_.clusters * kVecs]),
        ranked_(p_.clusters),
        is_kept_(p_.clusters) {}

  void run(int64_t b, int64_t h, int64_t first) {
    const int64_t count = std::min<int64_t>(kStripLanes, p_.rows - first);
    std::fill_n(queries_.get(), p_.head_dim * kVecs, Vec{});
    for (int64_t lane = 0; lane < count; ++lane) {
      const float* row = p_.q_centroids.at<const float>(b, h, first + lane);
      float* column = reinterpret_cast<float*>(queries_.get()) + lane;
      for (int64_t d = 0; d < p_.head_dim; ++d) column[d * kStripLanes] = row[d];
    }
    compute_weights(b, h);
    for (int64_t lane = 0; lane < count; ++lane) select(b, h, first + lane, lane);
  }

 private:
  // weights[j][lane] = n_j exp(score - the largest score of the lane)
  void compute_weights(int64_t b, int64_t h) {
    constexpr float kLog2e = 1.44269504088896340736f;
    const float* kv = p_.kv_centroids.at<const float>(b, h * p_.kv_heads / p_.heads);
    const int32_t* sizes = p_.kv_sizes.at<const int32_t>(b, h * p_.kv_heads / p_.heads);
    Vec top[kVecs];
    std::fill_n(top, kVecs, splat(-kInfinity));
    for_row_groups<kVecs>(p_.clusters, [&](auto rows, int64_t first) {
      constexpr int Rows = rows;
      Vec sums[Rows][kVecs] = {};
      multiply<Fp32, Rows, kVecs>(sums, kv + first * p_.kv_centroids.row, p_.kv_centroids.row, 1,
                                  queries_.get(), p_.head_dim);
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < kVecs; ++v) {
          const Vec score = sizes[first + r] ? sums[r][v] * (p_.scale * kLog2e) : splat(-kInfinity);
          weights_[(first + r) * kVecs + v] = score;
          top[v] = max(score, top[v]);
        }
      }
    });
    for (int64_t j = 0; j < p_.clusters; ++j) {
      for (int v = 0; v < kVecs; ++v) {
        Vec& weight = weights_[j * kVecs + v];
        weight = exp2(weight - top[v]) * static_cast<float>(sizes[j]);
      }
    }
  }

  void select(int64_t b, int64_t h, int64_t row, int64_t lane) {
    const float* weights = reinterpret_cast<const float*>(weights_.get()) + lane;
    // The bits of non-negative floats rise with the floats, so inverted they sort by falling weight, then by index.
    double total = 0.0;
    for (int64_t j = 0; j < p_.clusters; ++j) {
      const float weight = weights[j * kStripLanes];
      total += weight;
      ranked_[j] = uint64_t(~bit_cast<uint32_t>(weight)) << 32 | uint64_t(j);
    }
    double kept = 0.0;
    int64_t count = 0;
    if (p_.floor == p_.clusters || !(total > 0.0)) {  // all are kept, or the row has a NaN
      std::fill(is_kept_.begin(), is_kept_.end(), true);
      count = p_.clusters;
    } else {
      std::sort(ranked_.begin(), ranked_.end());
      std::fill(is_kept_.begin(), is_kept_.end(), false);
      for (; count < p_.clusters && (count < p_.floor || kept < p_.top_p * total); ++count) {
        const uint32_t j = static_cast<uint32_t>(ranked_[count]);
        is_kept_[j] = true;
        kept += weights[j * kStripLanes];
      }
    }
    int32_t* indices = p_.kv_indices.at<int32_t>(b, h, row);
    int64_t next_kept = 0, next_other = count;
    for (int64_t j = 0; j < p_.clusters; ++j) indices[is_kept_[j] ? next_kept++ : next_other++] = j;
    *p_.kv_num_blocks.at<int32_t>(b, h, row) = count;
    *p_.kept.at<float>(b, h, row) = count == p_.clusters ? 1.0f : static_cast<float>(kept / total);
  }

  const TopP& p_;
  std::unique_ptr<Vec[]> queries_, weights_;
  std::vector<uint64_t> ranked_;
  std::vector<uint8_t> is_kept_;
};

#if defined(__AVX512BF16__)
using BFloat16Math = Bf16Pairs;
#else
using BFloat16Math = Fp32;
#endif

}  // namespace

extern "C" bool sparsify_kmeans(const KMeans* problem) {
  if (!problem->batch || !problem->heads) return true;
  switch (problem->dtype) {
    case kFloat32: return run_kmeans<Fp32, float>(*problem);
    case kFloat16: return run_kmeans<Fp32, Half>(*problem);
    case kBFloat16: return run_kmeans<BFloat16Math, BFloat16>(*problem);
  }
  return false;
}

extern "C" bool sparsify_sort_by_label(const Sort* problem) {
  const Sort& p = *problem;
  const bool fits = all_fit(p.labels, p.batch, p.heads, [&](int64_t b, int64_t h) {
    return all_below(p.labels.at<const int32_t>(b, h), p.tokens, p.clusters, p.labels.row);
  });
  if (!fits) return false;
  const int threads = threads_for(p.batch * p.heads * p.tokens, p.threads);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < p.batch * p.heads; ++i) {
    const int64_t b = i / p.heads, h = i % p.heads;
    sort_tokens(p.labels.at<const int32_t>(b, h), p.labels.row, p.tokens, p.clusters,
                p.order.at<int32_t>(b, h), p.bounds.at<int32_t>(b, h));
  }
  return true;
}

extern "C" bool sparsify_top_p_blocks(const TopP* problem) {
  const TopP& p = *problem;
  const int64_t strips = ceil_div(p.rows, kStripLanes);
  const int threads = threads_for(p.batch * p.heads * p.rows * p.clusters / 8, p.threads);
#pragma omp parallel num_threads(threads)
  {
    Selector selector(p);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < p.batch * p.heads * strips; ++i) {
      const int64_t head = i / strips;
      selector.run(head / p.heads, head % p.heads, i % strips * kStripLanes);
    }
  }
  return true;
}
