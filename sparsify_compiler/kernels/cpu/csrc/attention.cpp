// Block-sparse attention on the CPU: flash attention over the keys that a block table lists.
//
// Work is cut into tiles of up to kTileQueries queries of one query block; threads take tiles, costly ones first. A
// tile goes through its keys in chunks: all listed keys, long ranges or single tokens, in any order, are gathered into
// dense chunks, so products do not depend on the table. A tile is a few strips (strips.h):
//
//     scores[key][query] = sum over d of keys[key][d] * queries[d][query]
//     out[d][query]     += sum over key of values[key][d] * exp2(scores[key][query] - max[query])
//
// or, where a block has only a few queries, these queries (few.h).
//
// With a far field, a tile first reads a virtual key for each block that the table does not list. The sums at this
// point are the far field's share, with which its linear term is multiplied. The near field continues these sums.

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "few.h"
#include "interface.h"
#include "workers.h"

namespace {

// Keys and values, numbered by tokens or by blocks. `bias` is null without a bias.
template <class T>
struct Source {
  const T *keys, *values;
  int64_t key_stride, value_stride;
  const float* bias;

  Source(const View& key, const View& value, const View& bias, const Tile& tile, int64_t head)
      : keys(key.at<const T>(tile.batch, head)),
        values(value.at<const T>(tile.batch, head)),
        key_stride(key.row),
        value_stride(value.row),
        bias(bias.data ? bias.at<const float>(tile.batch, tile.head) : nullptr) {}

  static Source near(const Problem& p, const Tile& tile) {
    return Source(p.key, p.value, p.key_bias, tile, p.kv_head(tile.head));
  }
  static Source far(const Problem& p, const FarField& far, const Tile& tile) {
    return Source(far.key, far.value, far.bias, tile, tile.head * far.heads / p.heads);
  }

  const T* key(int32_t i) const { return keys + i * key_stride; }
  const T* value(int32_t i) const { return values + i * value_stride; }
  float bias_of(int32_t i) const { return bias ? bias[i] * kLog2e : 0.0f; }
};

// The virtual keys of a tile, and the bias of each, by block.
struct Skipped {
  std::vector<int32_t> blocks;
  const float* bias;
  std::vector<float> own_bias;
};

// Every block of which the tile's row leaves keys unread. The virtual key has the weight of these keys.
Skipped partly_skipped_blocks(const FarField& far, const Tile& tile) {
  const float* bias = far.bias.at<const float>(tile.batch, tile.head);
  Skipped skipped;
  skipped.own_bias.resize(far.blocks);
  for (int64_t block = 0; block < far.blocks; ++block) {
    const float unread = far.unread(tile.batch, tile.head, tile.block, block);
    if (!(unread > 0.0f) || bias[block] == -kInfinity) continue;
    skipped.blocks.push_back(block);
    skipped.own_bias[block] = bias[block] + std::log(unread);
  }
  skipped.bias = skipped.own_bias.data();
  return skipped;
}

// The blocks that a tile's row of the table does not list and whose weight is not 0.
Skipped skipped_blocks(const Problem& p, const FarField& far, const Tile& tile) {
  if (far.left.data) return partly_skipped_blocks(far, tile);
  const float* bias = far.bias.at<const float>(tile.batch, tile.head);
  std::vector<char> skipped(far.blocks);
  for (int64_t block = 0; block < far.blocks; ++block) skipped[block] = bias[block] != -kInfinity;
  const int32_t* listed = p.kv_indices.at<int32_t>(tile.batch, tile.head, tile.block);
  const int32_t count = *p.kv_num_blocks.at<int32_t>(tile.batch, tile.head, tile.block);
  for (int32_t i = 0; i < count; ++i) skipped[listed[i]] = 0;
  std::vector<int32_t> blocks;
  for (int64_t block = 0; block < far.blocks; ++block) {
    if (skipped[block]) blocks.push_back(block);
  }
  return {std::move(blocks), bias, {}};
}

// The state of up to kStripQueries queries.
struct Strip {
  int64_t queries_in_use;
  Vec* queries;  // [words][Vecs]
  Vec* out;      // [value_dim][Vecs], before division by the sum of weights
  Softmax softmax;

  int vecs() const { return vecs_for(queries_in_use); }
};

template <class Products, int Vecs>
void attend(Strip& strip, const Keys& keys, const float* values, int64_t value_dim, float scale, Vec* scores) {
  Vec top[Vecs], decay[Vecs];
  compute_scores<Products, Vecs>(strip.softmax, keys, strip.queries, scale, scores, top);
  compute_weights<Products, Vecs>(strip.softmax, keys.count, scores, top, decay);
  Products::template add_values<Vecs>(values, value_dim, keys.count, scores, decay, strip.out);
}

// Runs tiles one after another on its own scratch memory.
template <class Products, class T>
class Worker {
 public:
  Worker(const Problem& problem, const FarField* far)
      : p_(problem),
        far_(far),
        key_words_(row_words<Products>(p_.head_dim)),
        value_rows_(round_up(p_.value_dim, Products::kRows)),
        queries_(new Vec[kTileStrips * key_words_ * kVecs]),
        out_(new Vec[kTileStrips * value_rows_ * kVecs]),
        scores_(new Vec[(Products::kChunkKeys + 1) * kVecs]),
        keys_(aligned_floats(Products::kChunkKeys * key_words_)),
        values_(aligned_floats(Products::kChunkKeys / Products::kPerWord * value_rows_)),
        column_(new Packed[p_.head_dim]) {}

  void run(const Tile& tile) {
    const int strips = load_queries(tile);
    if (far_) read_far_field(tile, strips);
    const auto near = Source<T>::near(p_, tile);
    KeyStream stream(p_, tile.batch, tile.head, tile.block);
    while (const int count = stream.take(tokens_, Products::kChunkKeys)) read(near, tokens_, count, strips);
    for (int s = 0; s < strips; ++s) store(tile, s);
  }

 private:
  // Fills the strips of the tile and returns their number.
  int load_queries(const Tile& tile) {
    int strips = 0;
    for (int64_t first = tile.first; first < tile.last; first += kStripQueries, ++strips) {
      Strip& strip = strips_[strips];
      strip.queries_in_use = std::min<int64_t>(kStripQueries, tile.last - first);
      strip.queries = queries_.get() + strips * key_words_ * kVecs;
      strip.out = out_.get() + strips * value_rows_ * kVecs;
      strip.softmax.clear();
      std::fill_n(strip.out, value_rows_ * kVecs, Vec{});
      auto row_of = [&](int64_t lane) {
        return p_.query.at<const T>(tile.batch, tile.head, p_.query_token(tile, first + lane));
      };
      // The memory for keys is free until the first chunk.
      pack_columns<Products>(strip.queries_in_use, p_.head_dim, row_of, floats(keys_), key_words_, strip.queries);
    }
    return strips;
  }

  // The next `count` keys of all strips.
  void read(const Source<T>& source, const int32_t* tokens, int count, int strips) {
    const Keys keys = pack_chunk(source, tokens, count);
    for (int s = 0; s < strips; ++s) {
      with_vecs(strips_[s].vecs(), [&](auto vecs) {
        attend<Products, vecs>(strips_[s], keys, floats(values_), p_.value_dim, p_.scale * kLog2e, scores_.get());
      });
    }
  }

  Keys pack_chunk(const Source<T>& source, const int32_t* tokens, int count) {
    auto key_row = [&](int64_t i) { return source.key(tokens[i]); };
    auto value_row = [&](int64_t i) { return source.value(tokens[i]); };
    for_each_row(count, p_.head_dim, key_row, [&](int64_t i) {
      Products::pack_row(key_row(i), p_.head_dim, floats(keys_) + i * key_words_);
      bias_[i] = source.bias_of(tokens[i]);
    });
    Products::pack_values(count, p_.value_dim, value_row, floats(values_));
    return {count, key_words_, floats(keys_), bias_};
  }

  // Before anything else.
  void read_far_field(const Tile& tile, int strips) {
    const Skipped skipped = skipped_blocks(p_, *far_, tile);
    const std::vector<int32_t>& blocks = skipped.blocks;
    auto far = Source<T>::far(p_, *far_, tile);
    far.bias = skipped.bias;
    for (int64_t first = 0; first < int64_t(blocks.size()); first += Products::kChunkKeys) {
      const int count = std::min<int64_t>(Products::kChunkKeys, blocks.size() - first);
      read(far, blocks.data() + first, count, strips);
    }
    if (blocks.empty() || !far_->matrices.data) return;
    for (int64_t first = 0; first < p_.value_dim; first += kTermChannels) {
      const int count = std::min<int64_t>(kTermChannels, p_.value_dim - first);
      pack_columns_of_matrix(far_->matrices.at<float>(tile.batch, tile.head, tile.block) + first, count);
      const float* limits = far_->limits.at<float>(tile.batch, tile.head, tile.block) + first;
      for (int s = 0; s < strips; ++s) {
        with_vecs(strips_[s].vecs(), [&](auto vecs) { add_linear_term<vecs>(strips_[s], first, count, limits); });
      }
    }
  }

  void pack_columns_of_matrix(const float* matrix, int count) {
    Packed* column = column_.get();
    for (int i = 0; i < count; ++i) {
      for (int64_t d = 0; d < p_.head_dim; ++d) column[d] = from_float<Packed>(matrix[d * p_.value_dim + i]);
      Products::pack_row(column, p_.head_dim, floats(keys_) + i * key_words_);
    }
  }

  // The sum of the weights times scale * query M, for `count` channels of M, which are packed like keys.
  template <int Vecs>
  void add_linear_term(Strip& strip, int64_t first, int count, const float* limits) {
    Products::template multiply_rows<Vecs>(
        floats(keys_), count, key_words_, strip.queries, scores_.get(), [&](int64_t i, int v, Vec product) {
          strip.out[(first + i) * Vecs + v] += strip.softmax.sum[v] * within(product * p_.scale, splat(limits[i]));
          return product;
        });
  }

  void store(const Tile& tile, int index) {
    const Strip& strip = strips_[index];
    const int64_t width = strip.vecs() * kLanes;
    for (int64_t lane = 0; lane < strip.queries_in_use; ++lane) {
      const int64_t token = p_.query_token(tile, tile.first + index * kStripQueries + lane);
      const float sum = reinterpret_cast<const float*>(strip.softmax.sum)[lane];
      const float max = reinterpret_cast<const float*>(strip.softmax.max)[lane];
      const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      const float* column = reinterpret_cast<const float*>(strip.out) + lane;
      T* out = p_.out.at<T>(tile.batch, tile.head, token);
      for (int64_t d = 0; d < p_.value_dim; ++d) out[d] = from_float<T>(column[d * width] * factor);
      float* lse = p_.lse.at<float>(tile.batch, tile.head, token);
      *lse = sum == 0.0f ? -kInfinity : (max + std::log2(sum)) * kLn2;
    }
  }

  static constexpr int kTermChannels = 128;  // less than the keys of a chunk
  using Packed = typename Products::Packed;

  const Problem& p_;
  const FarField* far_;
  const int64_t key_words_, value_rows_;
  std::unique_ptr<Vec[]> queries_, out_, scores_, keys_, values_;
  std::unique_ptr<Packed[]> column_;  // column of a matrix
  Products products_;
  Strip strips_[kTileStrips];
  int32_t tokens_[Products::kChunkKeys];
  float bias_[Products::kChunkKeys];
};

// Runs tiles of up to kMostFewQueries queries.
template <class T>
class FewWorker {
 public:
  FewWorker(const Problem& problem, const FarField* far)
      : p_(problem),
        far_(far),
        key_vecs_(vecs_for(p_.head_dim)),
        value_vecs_(vecs_for(p_.value_dim)),
        queries_(new Vec[kMostFewQueries * key_vecs_]),
        out_(new Vec[kMostFewQueries * value_vecs_]),
        term_(new float[p_.value_dim]) {
    keys_.dim = p_.head_dim, values_.dim = p_.value_dim;
  }

  void run(const Tile& tile) {
    const int queries = tile.last - tile.first;
    for (int i = 0; i < queries; ++i) {
      const int64_t token = p_.query_token(tile, tile.first + i);
      load_row(p_.query.at<const T>(tile.batch, tile.head, token), p_.head_dim, queries_.get() + i * key_vecs_);
      softmax_[i] = {};
    }
    std::fill_n(out_.get(), queries * value_vecs_, Vec{});
    if (far_) read_far_field(tile, queries);
    const auto near = Source<T>::near(p_, tile);
    KeyStream stream(p_, tile.batch, tile.head, tile.block);
    while (const int count = stream.take(tokens_, kChunkKeys)) read(near, tokens_, count, queries);
    for (int i = 0; i < queries; ++i) store(tile, i);
  }

 private:
  static constexpr int kChunkKeys = 64, kChunkVecs = kChunkKeys / kLanes;

  void read(const Source<T>& source, const int32_t* tokens, int count, int queries) {
    for (int i = 0; i < count; ++i) {
      keys_.at[i] = source.key(tokens[i]);
      values_.at[i] = source.value(tokens[i]);
      bias_[i] = source.bias_of(tokens[i]);
    }
    for (int i = count; i < round_up(count, kLanes); ++i) {
      keys_.at[i] = keys_.at[0];
      bias_[i] = -kInfinity;
    }
    for (int i = 0; i < queries; ++i) weigh(i, count);
    values_.add_to(out_.get(), queries, reinterpret_cast<const float*>(weights_), kChunkKeys, count);
  }

  // Before anything else.
  void read_far_field(const Tile& tile, int queries) {
    const Skipped skipped = skipped_blocks(p_, *far_, tile);
    const std::vector<int32_t>& blocks = skipped.blocks;
    auto far = Source<T>::far(p_, *far_, tile);
    far.bias = skipped.bias;
    for (int64_t first = 0; first < int64_t(blocks.size()); first += kChunkKeys) {
      read(far, blocks.data() + first, std::min<int64_t>(kChunkKeys, blocks.size() - first), queries);
    }
    if (blocks.empty() || !far_->matrices.data) return;
    const float* matrix = far_->matrices.at<float>(tile.batch, tile.head, tile.block);
    const float* limits = far_->limits.at<float>(tile.batch, tile.head, tile.block);
    for (int i = 0; i < queries; ++i) {
      const float* query = reinterpret_cast<const float*>(queries_.get() + i * key_vecs_);
      float* out = reinterpret_cast<float*>(out_.get() + i * value_vecs_);
      std::fill_n(term_.get(), p_.value_dim, 0.0f);
      for (int64_t d = 0; d < p_.head_dim; ++d) {
        for (int64_t c = 0; c < p_.value_dim; ++c) term_[c] += query[d] * matrix[d * p_.value_dim + c];
      }
      for (int64_t c = 0; c < p_.value_dim; ++c) {
        out[c] += softmax_[i].sum * within(p_.scale * term_[c], limits[c]);
      }
    }
  }

  // The weights of the chunk's keys for query i; earlier sums decay as its max rises.
  void weigh(int i, int count) {
    Vec* weights = weights_ + i * kChunkVecs;
    keys_.multiply(queries_.get() + i * key_vecs_, count, weights);
    add_bias(weights, p_.scale * kLog2e, bias_, count);
    const float decay = softmax_[i].weigh(weights, count);
    if (decay == 1.0f) return;
    for (int v = 0; v < value_vecs_; ++v) out_[i * value_vecs_ + v] *= decay;
  }

  void store(const Tile& tile, int i) {
    const auto [max, sum] = softmax_[i];
    const int64_t token = p_.query_token(tile, tile.first + i);
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
    const float* row = reinterpret_cast<const float*>(out_.get() + i * value_vecs_);
    T* out = p_.out.at<T>(tile.batch, tile.head, token);
    for (int64_t d = 0; d < p_.value_dim; ++d) out[d] = from_float<T>(row[d] * factor);
    *p_.lse.at<float>(tile.batch, tile.head, token) = sum == 0.0f ? -kInfinity : (max + std::log2(sum)) * kLn2;
  }

  const Problem& p_;
  const FarField* far_;
  const int key_vecs_, value_vecs_;
  std::unique_ptr<Vec[]> queries_, out_;
  std::unique_ptr<float[]> term_;
  Rows<T, kChunkKeys> keys_, values_;
  Vec weights_[kMostFewQueries * kChunkVecs];
  float bias_[kChunkKeys];
  RowSoftmax softmax_[kMostFewQueries];
  int32_t tokens_[kChunkKeys];
};

template <class Products, class T>
class AnyWorker final : public TileWorker {
 public:
  AnyWorker(const Problem& problem, const FarField* far) : worker_(problem, far), few_(problem, far) {}

  void run(const Tile& tile) override {
    if (tile.last - tile.first <= Products::kFewQueries) {
      few_.run(tile);
    } else {
      worker_.run(tile);
    }
  }

 private:
  Worker<Products, T> worker_;
  FewWorker<T> few_;
};

}  // namespace

std::unique_ptr<TileWorker> tile_worker(const Problem& problem, const FarField* far) {
  return with_types(problem.dtype, [&](auto types) -> std::unique_ptr<TileWorker> {
    return std::make_unique<AnyWorker<typename decltype(types)::Products, typename decltype(types)::Element>>(problem,
                                                                                                             far);
  });
}

void sort_tiles(std::vector<Tile>& tiles) {
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) {
    const int64_t x_cost = (x.last - x.first) * x.keys, y_cost = (y.last - y.first) * y.keys;
    return std::tie(x.batch, x.head, y_cost) < std::tie(y.batch, y.head, x_cost);
  });
}

// Without a far field, keys that the table does not list are dropped.
extern "C" bool sparsify_attention(const Problem* problem, const FarField* far) {
  if (!table_fits(*problem)) return false;
  std::vector<Tile> tiles = plan_tiles(*problem);
  sort_tiles(tiles);
  const int64_t count = tiles.size();
#pragma omp parallel num_threads(problem->threads)
  {
    const auto worker = tile_worker(*problem, far);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < count; ++i) worker->run(tiles[i]);
  }
  return true;
}
