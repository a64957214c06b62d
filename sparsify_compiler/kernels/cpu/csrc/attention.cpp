// Block-sparse attention on the CPU: flash attention over the keys that a block table lists.
//
// Work is cut into tiles of up to kTileQueries queries of one query block; threads take tiles, costly ones
// first. A tile goes through its keys in chunks: whatever the table lists, long ranges or single tokens, in
// any order, is gathered into one dense chunk, so products never see the table. A tile is a few strips (strips.h):
//
//     scores[key][query] = sum over d of keys[key][d] * queries[d][query]
//     out[d][query]     += sum over key of values[key][d] * exp2(scores[key][query] - max[query])

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "strips.h"

namespace {

// The state of up to kStripQueries queries.
struct Strip {
  int64_t queries_in_use;
  Vec* queries;  // [words][Vecs]
  Vec* out;      // [value_dim][Vecs], not yet divided by the sum of weights
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

// Runs tiles one after another on scratch memory of its own.
template <class Products, class T>
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : p_(problem),
        key_words_(row_words<Products>(p_.head_dim)),
        value_rows_(round_up(p_.value_dim, Products::kRows)),
        queries_(new Vec[kTileStrips * key_words_ * kVecs]),
        out_(new Vec[kTileStrips * value_rows_ * kVecs]),
        scores_(new Vec[(Products::kChunkKeys + 1) * kVecs]),
        keys_(aligned_floats(Products::kChunkKeys * key_words_)),
        values_(aligned_floats(Products::kChunkKeys / Products::kPerWord * value_rows_)) {}

  void run(const Tile& tile) {
    const int strips = load_queries(tile);
    KeyStream stream(p_, tile.batch, tile.head, tile.block);
    while (const int count = stream.take(tokens_, Products::kChunkKeys)) {
      const Keys keys = pack_chunk(tile, count);
      for (int s = 0; s < strips; ++s) {
        with_vecs(strips_[s].vecs(), [&](auto vecs) {
          attend<Products, vecs>(strips_[s], keys, floats(values_), p_.value_dim, p_.scale * kLog2e, scores_.get());
        });
      }
    }
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

  Keys pack_chunk(const Tile& tile, int count) {
    const int64_t head = p_.kv_head(tile.head);
    const float* bias = p_.key_bias.at<const float>(tile.batch, tile.head);
    auto key_row = [&](int64_t i) { return p_.key.at<const T>(tile.batch, head, tokens_[i]); };
    auto value_row = [&](int64_t i) { return p_.value.at<const T>(tile.batch, head, tokens_[i]); };
    for_each_row(count, p_.head_dim, key_row, [&](int64_t i) {
      Products::pack_row(key_row(i), p_.head_dim, floats(keys_) + i * key_words_);
      bias_[i] = p_.key_bias.data ? bias[tokens_[i]] * kLog2e : 0.0f;
    });
    Products::pack_values(count, p_.value_dim, value_row, floats(values_));
    return {count, key_words_, floats(keys_), bias_};
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

  const Problem& p_;
  const int64_t key_words_, value_rows_;
  std::unique_ptr<Vec[]> queries_, out_, scores_, keys_, values_;
  Products products_;
  Strip strips_[kTileStrips];
  int32_t tokens_[Products::kChunkKeys];
  float bias_[Products::kChunkKeys];
};

template <class Products, class T>
void run(const Problem& problem) {
  std::vector<Tile> tiles = plan_tiles(problem);
  // Head by head, whose keys then stay in the caches; in a head the longest first, so that all threads end at
  // about the same time.
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) {
    const int64_t x_cost = (x.last - x.first) * x.keys, y_cost = (y.last - y.first) * y.keys;
    return std::tie(x.batch, x.head, y_cost) < std::tie(y.batch, y.head, x_cost);
  });
  const int64_t count = tiles.size();
#pragma omp parallel num_threads(problem.threads)
  {
    Worker<Products, T> worker(problem);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) worker.run(tiles[i]);
  }
}

}  // namespace

extern "C" void sparsify_attention(const Problem* problem) {
  with_types(problem->dtype, [&](auto types) {
    run<typename decltype(types)::Products, typename decltype(types)::Element>(*problem);
  });
}
