// Attention with a far field in one call, as kernels/far_field/__init__.py defines it: statistics of blocks, virtual
// keys, blocks of large gain, the guard's exact rows, and near and far field.
//
// All threads go through the same phases (phases.h). What phases hand to each other stays in memory of this call. The
// covariances of blocks would be the largest part of it. They exist for some blocks and channels at a time, and the
// matrices M that they add up to for some heads at a time.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "phases.h"
#include "strips.h"
#include "workers.h"

namespace {

constexpr int64_t kRowsAtOnce = 16;     // query blocks that a thread takes at a time
constexpr int64_t kChannelsAtOnce = 16;  // rows of covariances that a thread takes at a time,
constexpr int64_t kMostCovariances = 512 << 10;  // for as many blocks as this number of bytes holds
constexpr int64_t kMostMatrices = 16 << 20;  // bytes of M that are in memory at a time, if they are of several heads
constexpr float kMostSecondOrder = 0.5f;
constexpr float kTiny = std::numeric_limits<float>::min();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory of a call. Its thread keeps up to kMostKept of it for the next call, since new memory costs a page fault for
// each page.
class Memory {
 public:
  ~Memory() {
    if (taken_ > kept().size && taken_ * int64_t(sizeof(Vec)) <= kMostKept) kept() = Kept(taken_);
  }

  // Uninitialised.
  Vec* take(int64_t vecs) {
    taken_ += vecs;
    if (taken_ <= kept().size) return kept().data.get() + taken_ - vecs;
    return own_.emplace_back(new Vec[vecs]).get();
  }

 private:
  static constexpr int64_t kMostKept = 32 << 20;  // bytes

  struct Kept {
    explicit Kept(int64_t vecs) : size(vecs), data(vecs ? new Vec[vecs] : nullptr) {}
    int64_t size;
    std::unique_ptr<Vec[]> data;
  };

  static Kept& kept() {
    static thread_local Kept kept(0);
    return kept;
  }

  int64_t taken_ = 0;
  std::vector<std::unique_ptr<Vec[]>> own_;
};

// Rows of floats, [batch][head][row], whose distance is rounded up to whole vectors. Uninitialised.
class Rows3 {
 public:
  Rows3() = default;
  Rows3(Memory& memory, int64_t batch, int64_t heads, int64_t rows, int64_t width)
      : heads_(heads), rows_(rows), stride_(round_up(width, kLanes)) {
    // Columns of rows whose distance is a multiple of pages share a few places of the caches.
    if (stride_ % kPage == 0) stride_ += kLanes;
    data_ = reinterpret_cast<float*>(memory.take(batch * heads * rows * stride_ / kLanes));
  }

  float* at(int64_t b, int64_t h, int64_t row = 0) const { return data_ + ((b * heads_ + h) * rows_ + row) * stride_; }
  int64_t stride() const { return stride_; }
  View view() const { return {data_, heads_ * rows_ * stride_, rows_ * stride_, stride_}; }

 private:
  static constexpr int64_t kPage = 4096 / sizeof(float);

  int64_t heads_ = 0, rows_ = 0, stride_ = 0;
  float* data_ = nullptr;
};

// Dense elements, [batch][head][row][dim].
template <class T>
class Elements {
 public:
  Elements() = default;
  Elements(int64_t batch, int64_t heads, int64_t rows, int64_t dim)
      : heads_(heads), rows_(rows), dim_(dim), data_(new T[batch * heads * rows * dim]) {}

  T* at(int64_t b, int64_t h, int64_t row = 0) const { return data_.get() + ((b * heads_ + h) * rows_ + row) * dim_; }
  View view() const { return {data_.get(), heads_ * rows_ * dim_, rows_ * dim_, dim_}; }

 private:
  int64_t heads_ = 0, rows_ = 0, dim_ = 0;
  std::unique_ptr<T[]> data_;
};

// out[r][j] = sum over i < words of left[r][i] * right[i][j], for j < width, in whole vectors; or adds the sum to it.
void multiply_matrices(const float* left, int64_t left_stride, int64_t rows, const float* right, int64_t right_stride,
                       int64_t words, int64_t width, float* out, int64_t out_stride, bool adds = false) {
  const int64_t vecs = vecs_for(width);
  for (int64_t v = 0; v < vecs; v += kVecs) {
    with_vecs(std::min<int64_t>(kVecs, vecs - v), [&](auto some) {
      constexpr int Vecs = some;
      const Vec* lines = reinterpret_cast<const Vec*>(right) + v;
      for_row_groups<Vecs>(rows, [&](auto group, int64_t first) {
        constexpr int Rows = group;
        Vec sums[Rows][Vecs] = {};
        multiply<Fp32, Rows, Vecs>(sums, left + first * left_stride, left_stride, 1, lines, words, right_stride / kLanes);
        UNROLL for (int r = 0; r < Rows; ++r) {
          Vec* line = reinterpret_cast<Vec*>(out + (first + r) * out_stride) + v;
          UNROLL for (int j = 0; j < Vecs; ++j) line[j] = adds ? line[j] + sums[r][j] : sums[r][j];
        }
      });
    });
  }
}

// Softmax of a row of whole vectors, in place; 0 where all scores are -inf.
void softmax_row(float* row, int64_t stride) {
  Vec* vecs = reinterpret_cast<Vec*>(row);
  const int64_t count = stride / kLanes;
  float top = -kInfinity;
  bool is_nan = false;
  for (int64_t i = 0; i < stride; ++i) top = std::max(top, row[i]), is_nan |= row[i] != row[i];
  if (top == -kInfinity && !is_nan) {
    std::fill_n(row, stride, 0.0f);
    return;
  }
  Vec sum{};
  for (int64_t v = 0; v < count; ++v) {
    vecs[v] = exp2((vecs[v] - top) * kLog2e);
    sum += vecs[v];
  }
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (int64_t v = 0; v < count; ++v) vecs[v] = vecs[v] / total;
}

double squared_norm(const float* row, int64_t dim) {
  float sum = 0.0f;
  for (int64_t d = 0; d < dim; ++d) sum += row[d] * row[d];
  return sum;
}

template <class T>
T narrowed(float x) {
  if constexpr (std::is_same_v<T, Half>) x = within(x, 65504.0f);
  return from_float<T>(x);
}

template <class T>
class Call {
 public:
  explicit Call(const WithFarField& problem)
      : q_(problem),
        p_(*problem.problem),
        batch_(p_.batch),
        heads_(p_.heads),
        groups_(q_.groups),
        blocks_(q_.blocks),
        rows_(p_.q_blocks),
        samples_(std::min(q_.sampled_rows, p_.q_tokens)),
        by_gain_(q_.linear && q_.min_gain >= 0.0f),
        main_(p_),
        bias_(memory_, batch_, heads_, 1, blocks_),
        log_weight_(memory_, batch_, groups_, 1, blocks_),
        key_mean_(memory_, batch_, groups_, blocks_, p_.head_dim),
        value_mean_(memory_, batch_, groups_, blocks_, p_.value_dim),
        far_key_(batch_, groups_, blocks_, p_.head_dim),
        far_value_(batch_, groups_, blocks_, p_.value_dim) {
    View log_weight = log_weight_.view();
    log_weight.row = 1;
    of_keys_ = Statistics{};
    of_keys_.key = p_.key, of_keys_.value = p_.value, of_keys_.bounds = q_.bounds, of_keys_.order = q_.order;
    of_keys_.key_bias = p_.key_bias, of_keys_.log_weight = log_weight;
    of_keys_.key_mean = key_mean_.view(), of_keys_.value_mean = value_mean_.view();
    of_keys_.batch = batch_, of_keys_.heads = groups_, of_keys_.kv_heads = p_.kv_heads, of_keys_.tokens = p_.kv_tokens;
    of_keys_.blocks = blocks_, of_keys_.head_dim = p_.head_dim, of_keys_.value_dim = p_.value_dim;
    of_keys_.dtype = p_.dtype;
    View bias = bias_.view();
    bias.row = 1;
    far_ = FarField{far_key_.view(), far_value_.view(), bias, {}, {}, groups_, blocks_, q_.left, q_.keys, q_.bounds};
    part_ = all_groups();
    if (q_.linear) prepare_linear();
    if (samples_) prepare_samples();
  }

  void run() {
    const int64_t parts = ceil_div(all_groups(), part_);
    Phases phases(5 + 4 * parts);
#pragma omp parallel num_threads(p_.threads)
    {
      Threads own;
      phases.run(0, exact_tiles_.size() + all_groups() * blocks_ + (q_.linear ? all_heads() * rows_ : 0),
                 [&](int64_t i) { read_blocks(own, i); });
      phases.run(1, all_heads(), [&](int64_t i) { finish_virtual_keys(i / heads_, i % heads_); });
      const int64_t chunks = q_.linear ? all_heads() * row_chunks() : 0;
      phases.run(2, chunks, [&](int64_t i) { for_chunk(i, [&](auto... at) { score(at...); }); });
      phases.run(3, by_gain_, [&](int64_t) { measure_power(); });
      phases.run(4, chunks, [&](int64_t i) { for_chunk(i, [&](auto... at) { choose(at...); }); });
      for (int64_t part = 0, phase = 5; part < parts; ++part, phase += 4) run_part(own, phases, phase, part * part_);
    }
  }

 private:
  // The guard computes its rows exactly, without a far field, and with its zeroth and first order.
  enum Variant { kNear, kMean, kLinear, kVariants };

  // The workers of a thread.
  struct Threads {
    std::unique_ptr<BlockWorker> keys, queries;
    std::unique_ptr<TileWorker> exact, main, variants[kVariants];
    std::unique_ptr<Vec[]> covariances;
  };

  // Some of `tiles`, which are sorted by head.
  struct Range {
    int64_t first, count;
  };

  // Everything that needs M, for the heads of part_ groups from a first one; groups are numbered with their batches.
  void run_part(Threads& own, Phases& phases, int64_t phase, int64_t group) {
    const int64_t groups = std::min(part_, all_groups() - group), first = group * copies(), heads = groups * copies();
    const int64_t strips = q_.linear ? ceil_div(p_.head_dim, kChannelsAtOnce) : 0;
    phases.run(phase, 1 + groups * strips, [&](int64_t i) {
      if (i == 0) return begin_part(first);
      add_up_covariances(own, group, group + (i - 1) / strips, (i - 1) % strips * kChannelsAtOnce);
    });
    const Range sampled = of_heads(sample_tiles_, first, heads), read = of_heads(tiles_, first, heads);
    phases.run(phase + 1, kVariants * sampled.count, [&](int64_t i) {
      const int variant = i / sampled.count;
      if (variant == kLinear && !q_.linear) return;
      worker(own.variants[variant], samples_problems_[variant], variant == kNear ? nullptr : &variants_far_[variant])
          .run(sample_tiles_[sampled.first + i % sampled.count]);
    });
    phases.run(phase + 2, heads, [&](int64_t i) { report((first + i) / heads_, (first + i) % heads_); });
    phases.run(phase + 3, read.count, [&](int64_t i) { worker(own.main, main_, &far_).run(tiles_[read.first + i]); });
  }

  Range of_heads(const std::vector<Tile>& tiles, int64_t first, int64_t count) const {
    const auto before = [&](int64_t head) {
      return std::partition_point(tiles.begin(), tiles.end(), [&](const Tile& tile) {
               return tile.batch * heads_ + tile.head < head;
             }) - tiles.begin();
    };
    return {before(first), before(first + count) - before(first)};
  }

  static TileWorker& worker(std::unique_ptr<TileWorker>& own, const Problem& problem, const FarField* far) {
    if (!own) own = tile_worker(problem, far);
    return *own;
  }

  int64_t all_heads() const { return batch_ * heads_; }
  int64_t all_groups() const { return batch_ * groups_; }
  int64_t row_chunks() const { return ceil_div(rows_, kRowsAtOnce); }
  int64_t matrix_size() const { return p_.head_dim * p_.value_dim; }
  int64_t group_of(int64_t h) const { return h * groups_ / heads_; }
  int64_t copies() const { return heads_ / groups_; }  // heads of a group

  void prepare_linear() {
    key_variance_ = Rows3(memory_, batch_, groups_, blocks_, p_.head_dim);
    value_variance_ = Rows3(memory_, batch_, groups_, blocks_, p_.value_dim);
    of_keys_.key_variance = key_variance_.view(), of_keys_.value_variance = value_variance_.view();
    mean_query_ = Rows3(memory_, batch_, heads_, rows_, p_.head_dim);
    mean_square_ = Rows3(memory_, batch_, heads_, rows_, p_.head_dim);
    of_queries_ = Statistics{};
    of_queries_.key = p_.query, of_queries_.bounds = p_.q_bounds, of_queries_.order = p_.q_order;
    of_queries_.key_mean = mean_query_.view(), of_queries_.key_mean_square = mean_square_.view();
    of_queries_.batch = batch_, of_queries_.heads = of_queries_.kv_heads = heads_, of_queries_.tokens = p_.q_tokens;
    of_queries_.blocks = rows_, of_queries_.head_dim = p_.head_dim, of_queries_.dtype = p_.dtype;
    keys_as_lanes_ = Rows3(memory_, batch_, groups_, p_.head_dim, blocks_);
    shares_ = Rows3(memory_, batch_, heads_, rows_, blocks_);
    const int64_t bytes = copies() * rows_ * matrix_size() * sizeof(float);
    const int64_t inputs = batch_ * sizeof(T) * (heads_ * p_.q_tokens * p_.head_dim +
                                                 p_.kv_heads * p_.kv_tokens * (p_.head_dim + p_.value_dim));
    part_ = std::clamp<int64_t>(std::max(kMostMatrices, inputs / 4) / std::max<int64_t>(bytes, 1), 1, all_groups());
    matrices_ = Rows3(memory_, 1, part_ * copies(), rows_, matrix_size());
    limits_ = Rows3(memory_, batch_, heads_, rows_, p_.value_dim);
    far_.limits = limits_.view();
    if (!by_gain_) return;
    variances_as_lanes_ = Rows3(memory_, batch_, groups_, p_.head_dim, blocks_);
    values_as_lanes_ = Rows3(memory_, batch_, groups_, p_.value_dim, blocks_);
    outputs_ = Rows3(memory_, batch_, heads_, rows_, p_.value_dim);
    kept_ = Rows3(memory_, batch_, heads_, 1, rows_);
    power_.resize(batch_);
    counts_ = Elements<int32_t>(batch_, heads_, rows_, 1);
    indices_ = Elements<int32_t>(batch_, heads_, rows_, blocks_);
    main_.kv_num_blocks = counts_.view(), main_.kv_indices = indices_.view(), main_.width = blocks_;
  }

  // The problems of the guard's rows.
  void prepare_samples() {
    sample_query_ = Elements<T>(batch_, heads_, samples_, p_.head_dim);
    sample_bounds_ = Elements<int32_t>(batch_, heads_, 1, rows_ + 1);
    Problem sample = main_;
    sample.query = sample_query_.view();
    sample.q_order = View{};
    sample.q_tokens = samples_;
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t h = 0; h < heads_; ++h) {
        const int32_t* order = p_.q_order.data ? p_.q_order.at<int32_t>(b, h) : nullptr;
        const int32_t* bounds = p_.q_bounds.at<int32_t>(b, h);
        int32_t* own = sample_bounds_.at(b, h);
        std::fill_n(own, rows_ + 1, 0);
        for (int64_t i = 0, block = 0; i < samples_; ++i) {
          const int64_t position = (2 * i + 1) * p_.q_tokens / (2 * samples_);
          const int64_t token = order ? order[position] : position;
          std::copy_n(p_.query.at<const T>(b, h, token), p_.head_dim, sample_query_.at(b, h, i));
          while (bounds[block + 1] <= position) own[++block] = i;
          if (i + 1 == samples_) std::fill(own + block + 1, own + rows_ + 1, int32_t(samples_));
        }
      }
    }
    auto with_outputs = [&](Problem problem, Elements<T>& out, Elements<float>& lse) {
      out = Elements<T>(batch_, heads_, samples_, p_.value_dim), lse = Elements<float>(batch_, heads_, samples_, 1);
      problem.out = out.view(), problem.lse = lse.view();
      return problem;
    };
    exact_ = with_outputs(sample, exact_out_, exact_lse_);
    exact_.q_bounds = {exact_q_bounds_, 0, 0, 0}, exact_.kv_bounds = {exact_kv_bounds_, 0, 0, 0};
    exact_.kv_num_blocks = {exact_count_, 0, 0, 0}, exact_.kv_indices = {exact_index_, 0, 0, 0};
    exact_.kv_order = View{};
    exact_.q_blocks = exact_.kv_blocks = exact_.width = 1;
    exact_q_bounds_[1] = samples_, exact_kv_bounds_[1] = p_.kv_tokens;
    exact_tiles_ = plan_tiles(exact_);
    sample.q_bounds = sample_bounds_.view();
    for (int v = 0; v < kVariants; ++v) samples_problems_[v] = with_outputs(sample, sample_out_[v], sample_lse_[v]);
    variants_far_[kMean] = variants_far_[kLinear] = far_;
    variants_far_[kMean].matrices = variants_far_[kMean].limits = View{};
  }

  // Phase 0: a tile of exact rows, or statistics of a block.
  void read_blocks(Threads& own, int64_t i) {
    const int64_t exact = exact_tiles_.size(), key_blocks = all_groups() * blocks_;
    if (i < exact) return worker(own.exact, exact_, nullptr).run(exact_tiles_[i]);
    i -= exact;
    if (i < key_blocks) {
      if (!own.keys) own.keys = block_worker(of_keys_);
      return own.keys->run(i / blocks_ / groups_, i / blocks_ % groups_, i % blocks_);
    }
    i -= key_blocks;
    if (!own.queries) own.queries = block_worker(of_queries_);
    own.queries->run(i / rows_ / heads_, i / rows_ % heads_, i % rows_);
  }

  // Phase 1: the virtual keys and their biases.
  void finish_virtual_keys(int64_t b, int64_t h) {
    const int64_t g = group_of(h);
    const float* weight = log_weight_.at(b, g);
    float* bias = bias_.at(b, h);
    std::copy_n(weight, blocks_, bias);
    if (q_.linear) {
      std::vector<float> square(p_.head_dim);
      const int32_t* bounds = p_.q_bounds.at<int32_t>(b, h);
      for (int64_t row = 0; row < rows_; ++row) {
        const float part = float(bounds[row + 1] - bounds[row]) / p_.q_tokens;
        for (int64_t d = 0; part > 0 && d < p_.head_dim; ++d) square[d] += part * mean_square_.at(b, h, row)[d];
      }
      for (int64_t j = 0; j < blocks_; ++j) {
        const float* variance = key_variance_.at(b, g, j);
        float sum = 0.0f;
        for (int64_t d = 0; d < p_.head_dim; ++d) sum += square[d] * variance[d];
        const float order = p_.scale * p_.scale / 2 * sum;
        bias[j] += order > kMostSecondOrder ? kMostSecondOrder : order;
      }
    }
    if (h > 0 && group_of(h - 1) == g) return;
    for (int64_t j = 0; j < blocks_; ++j) {
      for (int64_t d = 0; d < p_.head_dim; ++d) far_key_.at(b, g, j)[d] = narrowed<T>(key_mean_.at(b, g, j)[d]);
      for (int64_t d = 0; d < p_.value_dim; ++d) far_value_.at(b, g, j)[d] = narrowed<T>(value_mean_.at(b, g, j)[d]);
    }
    if (!q_.linear) return;
    transpose(key_mean_, keys_as_lanes_, b, g, p_.head_dim);
    if (!by_gain_) return;
    transpose(key_variance_, variances_as_lanes_, b, g, p_.head_dim);
    transpose(value_mean_, values_as_lanes_, b, g, p_.value_dim);
  }

  void transpose(const Rows3& rows, const Rows3& lanes, int64_t b, int64_t g, int64_t dim) const {
    for (int64_t j = 0; j < blocks_; ++j) {
      const float* row = rows.at(b, g, j);
      float* column = lanes.at(b, g) + j;
      for (int64_t d = 0; d < dim; ++d) column[d * lanes.stride()] = row[d];
    }
  }

  template <class Body>
  void for_chunk(int64_t i, Body body) {
    const int64_t head = i / row_chunks(), first = i % row_chunks() * kRowsAtOnce;
    body(head / heads_, head % heads_, first, std::min(kRowsAtOnce, rows_ - first));
  }

  // Phase 2: the scores of all virtual keys; with min_gain, the output that they give.
  void score(int64_t b, int64_t h, int64_t first, int64_t count) {
    const int64_t g = group_of(h), stride = shares_.stride();
    const float* bias = bias_.at(b, h);
    multiply_matrices(mean_query_.at(b, h, first), mean_query_.stride(), count, keys_as_lanes_.at(b, g), stride,
                      p_.head_dim, stride, shares_.at(b, h, first), stride);
    for (int64_t row = first; row < first + count; ++row) {
      float* scores = shares_.at(b, h, row);
      for (int64_t j = 0; j < blocks_; ++j) scores[j] = p_.scale * scores[j] + bias[j];
      std::fill(scores + blocks_, scores + stride, -kInfinity);
    }
    if (!by_gain_) return;
    const auto attention = aligned_floats(count * stride);
    for (int64_t i = 0; i < count; ++i) {
      std::copy_n(shares_.at(b, h, first + i), stride, floats(attention) + i * stride);
      softmax_row(floats(attention) + i * stride, stride);
    }
    multiply_matrices(floats(attention), stride, count, value_mean_.at(b, g), value_mean_.stride(), blocks_,
                      p_.value_dim, outputs_.at(b, h, first), outputs_.stride());
  }

  // Phase 3: the mean over heads and tokens of the squared output.
  void measure_power() {
    for (int64_t b = 0; b < batch_; ++b) {
      double all = 0.0;
      for (int64_t h = 0; h < heads_; ++h) {
        const int32_t* bounds = p_.q_bounds.at<int32_t>(b, h);
        double sum = 0.0;
        for (int64_t row = 0; row < rows_; ++row) {
          sum += (bounds[row + 1] - bounds[row]) * squared_norm(outputs_.at(b, h, row), p_.value_dim);
        }
        all += sum / std::max<int64_t>(p_.q_tokens, 1);
      }
      power_[b] = all / heads_;
    }
  }

  // Phase 4: the blocks that rows read, the shares of the others in the far field, and its limits.
  void choose(int64_t b, int64_t h, int64_t first, int64_t count) {
    const int64_t stride = shares_.stride();
    const auto gain = by_gain_ ? gains(b, h, first, count) : nullptr;
    std::vector<char> listed(blocks_);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = first + i;
      float* shares = shares_.at(b, h, row);
      if (q_.left.data) {
        for (int64_t j = 0; j < blocks_; ++j) {
          const float unread = far_.unread(b, h, row, j);
          shares[j] = unread > 0.0f ? shares[j] + std::log(unread) : -kInfinity;
        }
      } else {
        std::fill(listed.begin(), listed.end(), 0);
        const int32_t* indices = p_.kv_indices.at<int32_t>(b, h, row);
        const int32_t number = *p_.kv_num_blocks.at<int32_t>(b, h, row);
        for (int32_t n = 0; n < number; ++n) listed[indices[n]] = 1;
        if (by_gain_) add_by_gain(b, h, row, floats(gain) + i * stride, listed);
        for (int64_t j = 0; j < blocks_; ++j) shares[j] = listed[j] ? -kInfinity : shares[j];
      }
      softmax_row(shares, stride);
    }
    multiply_matrices(shares_.at(b, h, first), stride, count, value_variance_.at(b, group_of(h)), value_variance_.stride(),
                      blocks_, p_.value_dim, limits_.at(b, h, first), limits_.stride());
    for (int64_t row = first; row < first + count; ++row) {
      float* limits = limits_.at(b, h, row);
      for (int64_t d = 0; d < p_.value_dim; ++d) limits[d] = std::sqrt(limits[d] < kTiny ? kTiny : limits[d]);
    }
  }

  // The gain of every block for some rows, and in the rows after them the attention: [2 * kRowsAtOnce][blocks].
  std::unique_ptr<Vec[]> gains(int64_t b, int64_t h, int64_t first, int64_t count) const {
    const int64_t g = group_of(h), stride = shares_.stride();
    auto gain = aligned_floats(2 * kRowsAtOnce * stride);
    const auto across = aligned_floats(count * stride);
    multiply_matrices(mean_square_.at(b, h, first), mean_square_.stride(), count, variances_as_lanes_.at(b, g), stride,
                      p_.head_dim, stride, floats(gain), stride);
    multiply_matrices(outputs_.at(b, h, first), outputs_.stride(), count, values_as_lanes_.at(b, g), stride,
                      p_.value_dim, stride, floats(across), stride);
    std::vector<float> value(blocks_);
    for (int64_t j = 0; j < blocks_; ++j) {
      value[j] = squared_norm(value_mean_.at(b, g, j), p_.value_dim);
      for (int64_t d = 0; d < p_.value_dim; ++d) value[j] += value_variance_.at(b, g, j)[d];
    }
    const int32_t* bounds = q_.bounds.at<int32_t>(b, h);
    const float power = std::max(float(power_[b]), kTiny), scale = p_.scale * p_.scale;
    for (int64_t i = 0; i < count; ++i) {
      float *own = floats(gain) + i * stride, *attention = own + kRowsAtOnce * stride;
      std::copy_n(shares_.at(b, h, first + i), stride, attention);
      softmax_row(attention, stride);
      const float norm = squared_norm(outputs_.at(b, h, first + i), p_.value_dim);
      for (int64_t j = 0; j < blocks_; ++j) {
        const float apart = norm - 2 * floats(across)[i * stride + j] + value[j], root = attention[j] * (scale * own[j]);
        const float part = float(bounds[j + 1] - bounds[j]) / std::max<int64_t>(p_.kv_tokens, 1);
        const float error = root * root * (apart < 0.0f ? 0.0f : apart) / power;
        own[j] = part == 0.0f ? 0.0f : error / std::max(part, kTiny);
      }
    }
    return gain;
  }

  // Lists a row's other blocks of large gain.
  void add_by_gain(int64_t b, int64_t h, int64_t row, const float* gain, std::vector<char>& listed) {
    const float* attention = gain + kRowsAtOnce * shares_.stride();
    std::vector<int32_t> others;
    for (int64_t j = 0; j < blocks_; ++j) {
      if (!listed[j]) others.push_back(j);
    }
    for (const int32_t j : others) listed[j] = gain[j] > q_.min_gain;
    const int64_t best = std::min<int64_t>(q_.best, others.size());
    if (best > 0) {
      std::partial_sort(others.begin(), others.begin() + best, others.end(), [&](int32_t x, int32_t y) {
        const bool x_is_nan = gain[x] != gain[x], y_is_nan = gain[y] != gain[y];  // as in torch, NaN comes first
        return x_is_nan != y_is_nan ? x_is_nan : gain[x] > gain[y] || (!(gain[x] < gain[y]) && x < y);
      });
      for (int64_t i = 0; i < best; ++i) listed[others[i]] = 1;
    }
    int32_t* indices = indices_.at(b, h, row);
    int32_t count = 0;
    double kept = 0.0;
    for (int64_t j = 0; j < blocks_; ++j) {
      if (!listed[j]) continue;
      indices[count++] = j;
      kept += attention[j];
    }
    *counts_.at(b, h, row) = count;
    kept_.at(b, h)[row] = kept;
  }

  // In the first phase of a part: the tiles of the table that is now known, and the place of the part's matrices.
  void begin_part(int64_t first) {
    if (first == 0) {
      tiles_ = plan_tiles(main_);
      sort_tiles(tiles_);
      if (samples_) sample_tiles_ = plan_tiles(samples_problems_[kNear]);
    }
    if (!q_.linear) return;
    View matrices = matrices_.view();
    matrices.batch = heads_ * matrices.head;
    matrices.data = static_cast<float*>(matrices.data) - first * matrices.head;
    far_.matrices = variants_far_[kLinear].matrices = matrices;
  }

  // In the same phase: some rows of M, the sum of the covariances under the shares, for the heads of a group.
  void add_up_covariances(Threads& own, int64_t first_group, int64_t group, int64_t channel) {
    const int64_t b = group / groups_, g = group % groups_;
    const int64_t channels = std::min(kChannelsAtOnce, p_.head_dim - channel), width = channels * p_.value_dim;
    // Not a multiple of pages, as in Rows3.
    const int64_t stride = round_up(kChannelsAtOnce * p_.value_dim, kLanes) + kLanes;
    const int64_t at_once = std::clamp<int64_t>(kMostCovariances / sizeof(float) / stride, 1, blocks_);
    if (!own.covariances) own.covariances = aligned_floats(at_once * stride);
    if (!own.keys) own.keys = block_worker(of_keys_);
    for (int64_t block = 0; block < blocks_; block += at_once) {
      const int64_t some = std::min(at_once, blocks_ - block);
      for (int64_t j = 0; j < some; ++j) {
        own.keys->covariance(b, g, block + j, channel, channels, floats(own.covariances) + j * stride);
      }
      for (int64_t copy = 0; copy < copies(); ++copy) {
        multiply_matrices(shares_.at(b, g * copies() + copy) + block, shares_.stride(), rows_, floats(own.covariances),
                          stride, some, width,
                          matrices_.at(0, (group - first_group) * copies() + copy) + channel * p_.value_dim,
                          matrices_.stride(), block > 0);
      }
    }
  }

  // In the third phase of a part: the decisions of the guard, and the report.
  void report(int64_t b, int64_t h) {
    float* numbers = q_.report.at<float>(b, h);
    numbers[0] = density(b, h), numbers[1] = 1.0f, numbers[2] = numbers[3] = std::numeric_limits<float>::quiet_NaN();
    if (by_gain_) numbers[3] = kept(b, h);
    if (!samples_) return;
    double least = error(kMean, b, h);
    if (q_.linear) {
      const double whole = error(kLinear, b, h);
      if (whole <= least) {
        least = whole;
      } else {
        for (int64_t row = 0; row < rows_; ++row) {  // as a product: a limit that is not finite stays so
          float* limits = limits_.at(b, h, row);
          for (int64_t d = 0; d < p_.value_dim; ++d) limits[d] *= 0.0f;
        }
      }
    }
    if (!(least <= error(kNear, b, h))) {
      numbers[1] = 0.0f;
      std::fill_n(bias_.at(b, h), blocks_, -kInfinity);
    }
    double recall = 0.0;
    for (int64_t i = 0; i < samples_; ++i) {
      const float exact = *exact_lse_.at(b, h, i);
      recall += exact == -kInfinity ? 1.0f : std::exp(*sample_lse_[kNear].at(b, h, i) - exact);
    }
    numbers[2] = recall / samples_;
  }

  // The squared error of the sampled rows.
  double error(Variant variant, int64_t b, int64_t h) const {
    double sum = 0.0;
    for (int64_t i = 0; i < samples_; ++i) {
      const T *row = sample_out_[variant].at(b, h, i), *exact = exact_out_.at(b, h, i);
      float part = 0.0f;
      for (int64_t d = 0; d < p_.value_dim; ++d) {
        const float apart = to_float(row[d]) - to_float(exact[d]);
        part += apart * apart;
      }
      sum += part;
    }
    return sum;
  }

  double density(int64_t b, int64_t h) const {
    const int32_t *q_bounds = p_.q_bounds.at<int32_t>(b, h), *bounds = p_.kv_bounds.at<int32_t>(b, h);
    double pairs = 0.0;
    for (int64_t row = 0; row < rows_; ++row) {
      const int32_t* indices = main_.kv_indices.at<int32_t>(b, h, row);
      const int32_t count = *main_.kv_num_blocks.at<int32_t>(b, h, row);
      int64_t keys = 0;
      for (int32_t i = 0; i < count; ++i) keys += bounds[indices[i] + 1] - bounds[indices[i]];
      pairs += double(keys) * (q_bounds[row + 1] - q_bounds[row]);
    }
    return pairs / (double(p_.q_tokens) * p_.kv_tokens);
  }

  double kept(int64_t b, int64_t h) const {
    const int32_t* bounds = p_.q_bounds.at<int32_t>(b, h);
    double sum = 0.0;
    for (int64_t row = 0; row < rows_; ++row) sum += kept_.at(b, h)[row] * (bounds[row + 1] - bounds[row]);
    return sum / std::max<int64_t>(p_.q_tokens, 1);
  }

  Memory memory_;
  const WithFarField& q_;
  const Problem& p_;
  const int64_t batch_, heads_, groups_, blocks_, rows_, samples_;
  const bool by_gain_;
  Problem main_;  // with the blocks of large gain
  FarField far_;
  Statistics of_keys_, of_queries_;
  Rows3 bias_, log_weight_, key_mean_, value_mean_, key_variance_, value_variance_;
  Elements<T> far_key_, far_value_;
  Rows3 mean_query_, mean_square_, keys_as_lanes_, variances_as_lanes_, values_as_lanes_;
  Rows3 shares_;  // scores until phase 4
  Rows3 outputs_, kept_, limits_;
  int64_t part_ = 0;  // groups whose matrices are in memory at a time
  Rows3 matrices_;    // of the heads of a part
  std::vector<double> power_;
  Elements<int32_t> counts_, indices_;
  std::vector<Tile> tiles_;

  Elements<T> sample_query_, exact_out_, sample_out_[kVariants];
  Elements<float> exact_lse_, sample_lse_[kVariants];
  Elements<int32_t> sample_bounds_;
  Problem exact_, samples_problems_[kVariants];
  FarField variants_far_[kVariants];
  std::vector<Tile> exact_tiles_, sample_tiles_;
  int32_t exact_q_bounds_[2] = {}, exact_kv_bounds_[2] = {}, exact_count_[1] = {1}, exact_index_[1] = {0};
};

template <class T>
bool run(const WithFarField& problem) {
  Call<T>(problem).run();
  return true;
}

}  // namespace

extern "C" bool sparsify_attention_with_far_field(const WithFarField* problem) {
  const Problem& p = *problem->problem;
  if (!table_fits(p)) return false;
  if (problem->left.data && (!bounds_fit(problem->bounds, p.batch, p.heads, problem->blocks, p.kv_tokens) ||
                             !order_fits(problem->order, p.batch, p.heads, p.kv_tokens))) {
    return false;
  }
  switch (p.dtype) {
    case kFloat32: return run<float>(*problem);
    case kFloat16: return run<Half>(*problem);
    case kBFloat16: return run<BFloat16>(*problem);
  }
  return false;
}
