// Statistics of the blocks of a table, as kernels/statistics/__init__.py defines them.
//
// Threads take blocks. A thread reads a block in chunks of tokens, widened to fp32: once for the means, and once more
// for the centred moments, so that nothing cancels. A block of one chunk is loaded only once. The covariance of a chunk
// is a product of its keys, each times its weight, and its values, whose channels are vector lanes.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "check.h"
#include "interface.h"
#include "product.h"
#include "workers.h"

namespace {

constexpr int kChunkTokens = 128;
constexpr int kStripVecs = 2;  // vectors of value channels that a product covers at once
constexpr int kStripChannels = kStripVecs * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
class Worker final : public BlockWorker {
 public:
  explicit Worker(const Statistics& problem)
      : p_(problem),
        value_vecs_((p_.value_dim + kStripChannels - 1) / kStripChannels * kStripVecs),
        keys_(new float[kChunkTokens * p_.head_dim]),
        values_(new Vec[kChunkTokens * value_vecs_]()) {}

  void run(int64_t b, int64_t h, int64_t block) override {
    const auto [first, last] = open(b, h, block, 0, p_.head_dim);
    float* key_mean = p_.key_mean.at<float>(b, h, block);
    float* value_mean = p_.value_dim ? p_.value_mean.at<float>(b, h, block) : nullptr;
    float* mean_square = p_.key_mean_square.data ? p_.key_mean_square.at<float>(b, h, block) : nullptr;
    std::fill_n(key_mean, p_.head_dim, 0.0f);
    if (mean_square) std::fill_n(mean_square, p_.head_dim, 0.0f);
    if (value_mean) std::fill_n(value_mean, p_.value_dim, 0.0f);

    double total = 0.0;
    for_each_chunk(first, last, [&](int count) {
      float sum = 0.0f;
      for (int i = 0; i < count; ++i) sum += weights_[i];
      total += sum;
      add_to(key_mean, keys_.get(), count, p_.head_dim, p_.head_dim);
      if (mean_square) add_squares(mean_square, keys_.get(), count);
      if (value_mean) add_to(value_mean, value(0), count, p_.value_dim, value_vecs_ * kLanes);
    });
    if (p_.log_weight.data) *p_.log_weight.at<float>(b, h, block) = top_ + float(std::log(total));
    inverse_ = total > 0.0 ? float(1.0 / total) : 0.0f;
    for (int64_t d = 0; d < p_.head_dim; ++d) key_mean[d] *= inverse_;
    for (int64_t d = 0; mean_square && d < p_.head_dim; ++d) mean_square[d] *= inverse_;
    if (!value_mean) return;
    for (int64_t d = 0; d < p_.value_dim; ++d) value_mean[d] *= inverse_;
    if (p_.key_variance.data) second_moments(b, h, block, first, last, key_mean, value_mean);
  }

  void covariance(int64_t b, int64_t h, int64_t block, int64_t first_channel, int64_t channels, float* out) override {
    const auto [first, last] = open(b, h, block, first_channel, channels);
    double total = 0.0;
    for (int64_t i = first; i < last; ++i) total += weight_of(token(i));
    inverse_ = total > 0.0 ? float(1.0 / total) : 0.0f;
    const float *key_mean = p_.key_mean.at<float>(b, h, block) + first_channel;
    const float *value_mean = p_.value_mean.at<float>(b, h, block);
    std::fill_n(out, channels * p_.value_dim, 0.0f);
    for_each_chunk(first, last, [&](int count) {
      for (int i = 0; i < count; ++i) {
        centre(keys_.get() + i * channels, key_mean, channels, weights_[i] * inverse_);
        centre(value(i), value_mean, p_.value_dim, 1.0f);
      }
      add_products(count, out);
    });
  }

 private:
  // Goes to some channels of the keys of a block, and to its values. Returns the block's first position and its last.
  std::pair<int64_t, int64_t> open(int64_t b, int64_t h, int64_t block, int64_t first_channel, int64_t channels) {
    const int32_t* bounds = p_.bounds.at<int32_t>(b, h);
    const int64_t first = bounds[block], last = bounds[block + 1], head = h * p_.kv_heads / p_.heads;
    order_ = p_.order.data ? p_.order.at<int32_t>(b, h) : nullptr;
    bias_ = p_.key_bias.data ? p_.key_bias.at<float>(b, h) : nullptr;
    key_ = p_.key.at<const T>(b, head) + first_channel;
    value_ = p_.value_dim ? p_.value.at<const T>(b, head) : nullptr;
    channels_ = channels;
    top_ = last > first ? 0.0f : -kInfinity;
    if (bias_) {
      top_ = -kInfinity;
      for (int64_t i = first; i < last; ++i) top_ = std::max(top_, bias_[token(i)]);
    }
    return {first, last};
  }

  // The weight of a token. The largest of the block is 1.
  float weight_of(int64_t token) const {
    return !bias_ ? 1.0f : top_ == -kInfinity ? 0.0f : std::exp(bias_[token] - top_);
  }

  int64_t token(int64_t position) const { return order_ ? order_[position] : position; }
  float* value(int64_t i) const { return reinterpret_cast<float*>(values_.get() + i * value_vecs_); }

  // sum over i < count of weight[i] * rows[i], added to `out`.
  void add_to(float* __restrict out, const float* __restrict rows, int count, int64_t dim, int64_t stride) const {
    for (int i = 0; i < count; ++i, rows += stride) {
      const float weight = weights_[i];
      for (int64_t d = 0; d < dim; ++d) out[d] += weight * rows[d];
    }
  }

  void add_squares(float* __restrict out, const float* __restrict rows, int count) const {
    for (int i = 0; i < count; ++i, rows += p_.head_dim) {
      for (int64_t d = 0; d < p_.head_dim; ++d) out[d] += weights_[i] * rows[d] * rows[d];
    }
  }

  // Calls body(count) for every chunk, with its tokens in keys_ and values_ and their weights in weights_. The largest
  // weight of the block is 1. Tokens of weight 0 are left out, since they may hold anything.
  template <class Body>
  void for_each_chunk(int64_t first, int64_t last, Body body) {
    loaded_ = 0;
    if (top_ == -kInfinity) return;
    int count = 0;
    auto flush = [&] {
      body(count);
      loaded_ = count, count = 0;
    };
    auto row_of = [&](int64_t i) { return key_ + token(first + i) * p_.key.row; };
    for_each_row(last - first, channels_, row_of, [&](int64_t i) {
      const int64_t t = token(first + i);
      const float weight = weight_of(t);
      if (weight == 0.0f) return;
      weights_[count] = weight;
      widen(key_ + t * p_.key.row, keys_.get() + count * channels_, channels_);
      if (value_ && i + kRowsAhead < last - first) {
        prefetch_row(value_ + token(first + i + kRowsAhead) * p_.value.row, p_.value_dim);
      }
      if (value_) widen(value_ + t * p_.value.row, value(count), p_.value_dim);
      if (++count == kChunkTokens) flush();
    });
    if (count) flush();
  }

  static void widen(const T* __restrict row, float* __restrict out, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) out[d] = to_float(row[d]);
  }

  void second_moments(int64_t b, int64_t h, int64_t block, int64_t first, int64_t last, const float* key_mean,
                      const float* value_mean) {
    float* key_variance = p_.key_variance.at<float>(b, h, block);
    float* value_variance = p_.value_variance.at<float>(b, h, block);
    float* covariance = p_.covariance.data ? p_.covariance.at<float>(b, h, block) : nullptr;
    std::fill_n(key_variance, p_.head_dim, 0.0f);
    std::fill_n(value_variance, p_.value_dim, 0.0f);
    if (covariance) std::fill_n(covariance, p_.head_dim * p_.value_dim, 0.0f);
    auto add = [&](int count) {
      for (int i = 0; i < count; ++i) {
        const float weight = weights_[i] * inverse_;
        add_variance(keys_.get() + i * p_.head_dim, key_mean, weight, p_.head_dim, key_variance);
        add_variance(value(i), value_mean, weight, p_.value_dim, value_variance);
        if (!covariance) continue;
        centre(keys_.get() + i * p_.head_dim, key_mean, p_.head_dim, weight);
        centre(value(i), value_mean, p_.value_dim, 1.0f);
      }
      if (covariance) add_products(count, covariance);
    };
    if (last - first <= kChunkTokens) {
      if (loaded_) add(loaded_);
    } else {
      for_each_chunk(first, last, add);
    }
  }

  static void add_variance(const float* __restrict row, const float* __restrict mean, float weight, int64_t dim,
                           float* __restrict variance) {
    for (int64_t d = 0; d < dim; ++d) {
      const float centred = row[d] - mean[d];
      variance[d] += weight * centred * centred;
    }
  }

  // Subtracts the mean from a row, and multiplies the row by `factor`.
  static void centre(float* __restrict row, const float* __restrict mean, int64_t dim, float factor) {
    for (int64_t d = 0; d < dim; ++d) row[d] = factor * (row[d] - mean[d]);
  }

  void add_products(int count, float* covariance) {
    for (int v = 0; v < value_vecs_; v += kStripVecs) add_product(v, count, covariance + v * kLanes);
  }

  // Adds the product of the chunk's weighted keys and a strip of its values to the covariance, from its channel on.
  void add_product(int v, int count, float* covariance) {
    const int64_t width = std::min<int64_t>(kStripChannels, p_.value_dim - v * kLanes);
    for_row_groups<kStripVecs>(channels_, [&](auto rows, int64_t first) {
      constexpr int Rows = rows;
      Vec sums[Rows][kStripVecs] = {};
      multiply<Fp32, Rows, kStripVecs>(sums, keys_.get() + first, 1, channels_, values_.get() + v, count,
                                       value_vecs_);
      UNROLL for (int r = 0; r < Rows; ++r) {
        float* __restrict out = covariance + (first + r) * p_.value_dim;
        const float* added = reinterpret_cast<const float*>(sums[r]);
        if (width == kStripChannels) {
          for (int i = 0; i < kStripChannels; ++i) out[i] += added[i];
        } else {
          for (int i = 0; i < width; ++i) out[i] += added[i];
        }
      }
    });
  }

  const Statistics& p_;
  const int value_vecs_;  // vectors of a row of values, padded with zeros to whole strips
  const int32_t* order_;
  const float* bias_;
  const T *key_, *value_;  // from the first of the channels
  int64_t channels_;       // of keys that are read
  float top_, inverse_;
  float weights_[kChunkTokens];
  int loaded_ = 0;  // tokens of the last chunk
  std::unique_ptr<float[]> keys_;
  std::unique_ptr<Vec[]> values_;
};

}  // namespace

std::unique_ptr<BlockWorker> block_worker(const Statistics& problem) {
  switch (problem.dtype) {
    case kFloat32: return std::make_unique<Worker<float>>(problem);
    case kFloat16: return std::make_unique<Worker<Half>>(problem);
    default: return std::make_unique<Worker<BFloat16>>(problem);
  }
}

extern "C" bool sparsify_block_statistics(const Statistics* problem) {
  const Statistics& p = *problem;
  if (!bounds_fit(p.bounds, p.batch, p.heads, p.blocks, p.tokens) ||
      !order_fits(p.order, p.batch, p.heads, p.tokens)) {
    return false;
  }
#pragma omp parallel num_threads(p.threads)
  {
    const auto worker = block_worker(p);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < p.batch * p.heads * p.blocks; ++i) {
      const int64_t head = i / p.blocks;
      worker->run(head / p.heads, head % p.heads, i % p.blocks);
    }
  }
  return true;
}
