// The gradients of block-sparse attention, as kernels/attention/reference.py defines them.
//
// A tile of queries goes through its keys in dense chunks, strip by strip, as in attention.cpp. The weights are
// computed again, from the lse:
//
//     weights[key][query]  = exp2(scores[key][query] - lse[query])
//     d_scores[key][query] = weights[key][query] * (sum over d of values[key][d] * grads[d][query] - delta[query])
//     grad_query[d][query] += sum over key of keys[key][d] * d_scores[key][query]
//     grad_value[key][d]   += sum over query of weights[key][query] * grads[query][d]
//     grad_key[key][d]     += sum over query of d_scores[key][query] * queries[query][d]
//
// The last two sum over queries, which are lanes in the others. For them the weights enter word by word and the
// channels are lanes: queries and their grads are packed both ways, and nothing else is transposed.
// A tile of a few queries has channels as lanes everywhere (few.h).
//
// The gradients of keys and values are summed over all tiles, in memory that no other thread writes to. Each thread
// has one share of the tiles: consecutive tiles, with about the same cost in all shares. A head that is divided among
// shares is summed in their order. So the same number of threads gives the same bits.

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "few.h"

namespace {

struct BackwardProblem {
  Problem forward;
  View grad_out, grad_lse, grad_query, grad_key, grad_value;
};

// A larger lse has too few digits after the point to compute weights from it.
constexpr float kLargestLse = 256.0f;

// These two together should fit a core's second cache: the strips of tiles that go through the keys together, and the
// rows of the keys that they read in one step.
constexpr int64_t kBatchBytes = 512 << 10, kSegmentBytes = 768 << 10;

// ---- One key head ----------------------------------------------------------------------------------------

// A row in memory for each key, in the order of the table: the packed key and value, and the sums of their gradients.
class KeyHead {
 public:
  KeyHead(int64_t rows, int64_t key_words, int64_t value_words, int64_t head_dim, int64_t value_dim)
      : rows_(rows),
        value_(key_words),
        grad_key_(round_up(key_words + value_words, kLanes)),
        grad_value_(grad_key_ + vecs_for(head_dim) * kLanes),
        width_(grad_value_ + vecs_for(value_dim) * kLanes),
        memory_(new Vec[rows * width_ / kLanes]) {}

  int64_t rows() const { return rows_; }
  int64_t row_bytes() const { return width_ * sizeof(float); }
  float* key(int64_t row) const { return floats(memory_) + row * width_; }
  float* value(int64_t row) const { return key(row) + value_; }
  Vec* grad_key(int64_t row) const { return reinterpret_cast<Vec*>(key(row) + grad_key_); }
  Vec* grad_value(int64_t row) const { return reinterpret_cast<Vec*>(key(row) + grad_value_); }

  int32_t token_of(int64_t row) const { return order_ ? order_[row] : row; }
  int32_t row_of(int32_t token) const { return order_ ? row_of_token_[token] : token; }
  // True if the tokens that this head of queries reads lie in the order of the rows.
  bool in_order_of(const Problem& p, int64_t batch, int64_t query_head) const {
    return !order_ || order_ == p.kv_order.at<int32_t>(batch, query_head);
  }

  // Packs keys and values, and sets the sums to 0.
  template <class Products, class T>
  void load(const Problem& p, int64_t batch, int64_t head) {
    order_ = p.kv_order.data ? p.kv_order.at<int32_t>(batch, head * (p.heads / p.kv_heads)) : nullptr;
    if (order_) row_of_token_.resize(rows_);
    auto key_row = [&](int64_t row) { return p.key.at<const T>(batch, head, token_of(row)); };
    for_each_row(rows_, p.head_dim, key_row, [&](int64_t row) {
      if (order_) row_of_token_[order_[row]] = row;
      std::fill_n(key(row), width_, 0.0f);
      Products::pack_row(key_row(row), p.head_dim, key(row));
      Products::pack_row(p.value.at<const T>(batch, head, token_of(row)), p.value_dim, value(row));
    });
  }

 private:
  const int64_t rows_, value_, grad_key_, grad_value_, width_;
  std::unique_ptr<Vec[]> memory_;
  const int32_t* order_ = nullptr;
  std::vector<int32_t> row_of_token_;
};

// ---- Strips ----------------------------------------------------------------------------------------------

// The state of up to kStripQueries queries. Columns are [word][Vecs]. Lines have channels as lanes: for up to kVecs
// vectors of them [query word][vectors], then the same for the next ones. A query word is of neighbouring queries.
struct Strip {
  int64_t queries_in_use;
  Vec *queries, *grads;           // columns
  Vec *query_lines, *grad_lines;  // lines
  Vec* grad_query;                // [head_dim][Vecs], not yet scaled
  Vec base[kVecs], factor[kVecs];  // a weight is exp2(score - base) * factor
  Vec delta[kVecs];

  int vecs() const { return vecs_for(queries_in_use); }
};

// The query words of a strip of `vecs` vectors.
template <class Products>
constexpr int64_t query_words(int vecs) {
  return (vecs + Products::kPerWord - 1) / Products::kPerWord * kLanes;
}

// The rows of a strip's queries -> lines.
template <class Products, class RowOf>
void pack_lines(int64_t queries, int64_t dim, RowOf row_of, Vec* lines) {
  const int64_t words = query_words<Products>(vecs_for(queries));
  for (int64_t first = 0; first < dim; first += kVecs * kLanes) {
    const int64_t count = std::min<int64_t>(kVecs * kLanes, dim - first);
    for (int64_t word = 0; word < words; ++word, lines += vecs_for(count)) {
      const int64_t i = word * Products::kPerWord;
      if (i < queries) {
        const auto* below = i + 1 < queries ? row_of(i + 1) + first : nullptr;
        Products::pack_rows(row_of(i) + first, below, count, reinterpret_cast<float*>(lines));
      } else {
        std::fill_n(lines, vecs_for(count), Vec{});
      }
    }
  }
}

// Writes zeros in the lanes beyond the queries in use.
template <int Vecs>
void clear_unused_lanes(int64_t queries_in_use, int keys, Vec* rows) {
  const int64_t unused = Vecs * kLanes - queries_in_use;
  if (unused == 0) return;
  for (int key = 0; key < keys; ++key) {
    std::fill_n(reinterpret_cast<float*>(rows + key * Vecs) + queries_in_use, unused, 0.0f);
  }
}

// weights[key][v] = exp2(score - base) * factor, d_scores[key][v] = weight * (value . grad - delta)
template <class Products, int Vecs>
void differentiate(const Strip& strip, const Keys& keys, const float* values, int64_t value_words, float scale,
                   Vec* weights, Vec* d_scores) {
  Products::template multiply_rows<Vecs>(
      keys.rows, keys.count, keys.words, strip.queries, weights, [&](int64_t key, int v, Vec product) {
        return exp2(product * scale + keys.bias[key] - strip.base[v]) * strip.factor[v];
      });
  clear_unused_lanes<Vecs>(strip.queries_in_use, keys.count, weights);
  Products::template multiply_rows<Vecs>(
      values, keys.count, value_words, strip.grads, d_scores,
      [&](int64_t key, int v, Vec product) { return weights[key * Vecs + v] * (product - strip.delta[v]); });
  clear_unused_lanes<Vecs>(strip.queries_in_use, keys.count, d_scores);
}

// rows[key][v] -> packed[key][query word]
template <class Products, int Vecs>
void pack_query_words(int keys, const Vec* rows, Vec* packed) {
  for (int key = 0; key < keys; ++key, rows += Vecs) {
    UNROLL for (int v = 0; v < Vecs; v += 2) {
      *packed++ = Products::pair(rows[v], v + 1 < Vecs ? rows[v + 1] : Vec{});
    }
  }
}

// In place, rows[key][v] -> [key word][v], padded with zeros to whole tiles.
template <class Products, int Vecs>
void pack_key_words(int keys, Vec* rows) {
  std::fill_n(rows + keys * Vecs, Vecs, Vec{});  // pads the last word
  int words = 0;
  for (int key = 0; key < keys; key += Products::kPerWord, ++words) {
    UNROLL for (int v = 0; v < Vecs; ++v) {
      const Vec pair[] = {rows[key * Vecs + v], rows[(key + 1) * Vecs + v]};
      rows[words * Vecs + v] = Products::join(pair);
    }
  }
  std::fill_n(rows + words * Vecs, (round_up(words, Products::kWords) - words) * Vecs, Vec{});
}

// ---- A few queries ---------------------------------------------------------------------------------------

// The state of up to kMostFewQueries queries: rows with channels as lanes.
struct Few {
  Vec *queries, *grads, *grad_query;  // grad_query is not yet scaled
  float base[kMostFewQueries], factor[kMostFewQueries], delta[kMostFewQueries];  // as in a strip
};

// ---- One thread ------------------------------------------------------------------------------------------

// Runs tiles on its own scratch memory. T is the type of an element of the tensors.
template <class Products>
class Worker {
 public:
  explicit Worker(const BackwardProblem& problem)
      : backward_(problem),
        p_(problem.forward),
        key_words_(row_words<Products>(p_.head_dim)),
        value_words_(row_words<Products>(p_.value_dim)),
        key_rows_(round_up(p_.head_dim, Products::kRows)),
        batch_vecs_(std::max<int64_t>(kTileStrips * strip_size(kVecs), kBatchBytes / sizeof(Vec))),
        batch_memory_(new Vec[batch_vecs_]()),
        weights_(new Vec[kTileStrips * kRowsVecs]()),
        d_scores_(new Vec[kTileStrips * kRowsVecs]()),
        keys_(aligned_floats(kChunkKeys * key_words_)),
        values_(aligned_floats(kChunkKeys * value_words_)),
        key_columns_(aligned_floats(kPaired ? Products::kChunkKeys / Products::kPerWord * key_rows_ : 0)),
        unpaired_weights_(new Vec[(kChunkKeys + 1) * kVecs]),
        unpaired_d_scores_(new Vec[(kChunkKeys + 1) * kVecs]) {
    few_keys_.dim = p_.head_dim, few_values_.dim = p_.value_dim;
  }

  // Writes the gradients of the queries of some tiles, and adds those of keys and values to the sums of their head.
  template <class T>
  void run(const Tile* tile, const Tile* last, const KeyHead& head) {
    while (tile != last) {
      tile = load_batch<T>(tile, last, head);
      const int64_t segment = batch_.size() == 1 ? head.rows() : kSegmentBytes / head.row_bytes();
      for (int64_t end = std::max<int64_t>(segment, 1);; end += segment) {
        for (LoadedTile& loaded : batch_) run_segment(loaded, end, head);
        if (end >= head.rows()) break;
      }
      for (const LoadedTile& loaded : batch_) store<T>(loaded);
    }
  }

 private:
  static constexpr int kChunkKeys = Products::kBackwardChunkKeys;
  static constexpr int kChunkVecs = kChunkKeys / kLanes;
  static constexpr bool kPaired = Products::kPerWord == 2;
  using Packed = typename Products::Packed;  // an element of a key head
  static constexpr int64_t kRowsVecs = kChunkKeys * query_words<Products>(kVecs) / kLanes;  // of a strip's weights

  struct LoadedTile {
    Tile tile;
    KeyStream stream;
    bool rises;  // whether it reads the rows of its key head in order
    int strips;  // 0 if there are only a few queries
    Strip strip[kTileStrips];
    Few few;

    int queries() const { return tile.last - tile.first; }
  };

  // ---- Queries

  // The size of a strip of `vecs` vectors in the batch's memory.
  int64_t strip_size(int vecs) const {
    return vecs * (key_words_ + value_words_ + key_rows_) +
           query_words<Products>(vecs) * (vecs_for(p_.head_dim) + vecs_for(p_.value_dim));
  }

  int64_t few_size(int queries) const { return queries * (2 * vecs_for(p_.head_dim) + vecs_for(p_.value_dim)); }

  static bool is_few(const Tile& tile) { return tile.last - tile.first <= Products::kFewQueries; }

  // Loads as many tiles as fit the memory, and returns the next one.
  template <class T>
  const Tile* load_batch(const Tile* tile, const Tile* last, const KeyHead& head) {
    batch_.clear();
    free_ = batch_memory_.get();
    for (; tile != last; ++tile) {
      int64_t size = is_few(*tile) ? few_size(tile->last - tile->first) : 0;
      for (int64_t first = tile->first; first < tile->last && !is_few(*tile); first += kStripQueries) {
        size += strip_size(vecs_for(std::min<int64_t>(kStripQueries, tile->last - first)));
      }
      if (free_ + size > batch_memory_.get() + batch_vecs_) break;
      load_tile<T>(*tile, head);
    }
    return tile;
  }

  template <class T>
  void load_tile(const Tile& tile, const KeyHead& head) {
    const KeyStream stream(p_, tile.batch, tile.head, tile.block);
    const bool rises = head.in_order_of(p_, tile.batch, tile.head) && stream.rises();
    batch_.push_back({tile, stream, rises, 0, {}, {}});
    LoadedTile& loaded = batch_.back();
    if (is_few(tile)) return load_few<T>(loaded, head);
    bool digits_lost = false;
    for (int64_t first = tile.first; first < tile.last; first += kStripQueries) {
      Strip& strip = loaded.strip[loaded.strips++];
      strip.queries_in_use = std::min<int64_t>(kStripQueries, tile.last - first);
      pack<T>(strip, tile, first);
      digits_lost |= load_rows<T>(strip, tile, first);
    }
    if (digits_lost) renormalise(loaded, head);
  }

  // The strip's queries and grads from position `first`, both ways.
  template <class T>
  void pack(Strip& strip, const Tile& tile, int64_t first) {
    const int64_t count = strip.queries_in_use, words = query_words<Products>(strip.vecs());
    strip.queries = take(strip.vecs() * key_words_);
    strip.grads = take(strip.vecs() * value_words_);
    strip.grad_query = take(strip.vecs() * key_rows_);
    strip.query_lines = take(words * vecs_for(p_.head_dim));
    strip.grad_lines = take(words * vecs_for(p_.value_dim));
    std::fill_n(strip.grad_query, strip.vecs() * key_rows_, Vec{});
    auto query = [&](int64_t lane) {
      return p_.query.at<const T>(tile.batch, tile.head, p_.query_token(tile, first + lane));
    };
    auto grad = [&](int64_t lane) {
      return backward_.grad_out.at<const T>(tile.batch, tile.head, p_.query_token(tile, first + lane));
    };
    // The memory for keys and values is free until the first chunk.
    pack_columns<Products>(count, p_.head_dim, query, floats(keys_), key_words_, strip.queries);
    pack_columns<Products>(count, p_.value_dim, grad, floats(values_), value_words_, strip.grads);
    pack_lines<Products>(count, p_.head_dim, query, strip.query_lines);
    pack_lines<Products>(count, p_.value_dim, grad, strip.grad_lines);
  }

  Vec* take(int64_t vecs) { return std::exchange(free_, free_ + vecs); }

  // The numbers of each query; returns whether an lse has too few digits.
  template <class T>
  bool load_rows(Strip& strip, const Tile& tile, int64_t first) {
    std::fill_n(strip.base, kVecs, Vec{});
    std::fill_n(strip.factor, kVecs, splat(1.0f));
    std::fill_n(strip.delta, kVecs, Vec{});
    bool digits_lost = false;
    for (int64_t lane = 0; lane < strip.queries_in_use; ++lane) {
      digits_lost |= load_numbers<T>(tile, first + lane, reinterpret_cast<float*>(strip.base)[lane],
                                     reinterpret_cast<float*>(strip.delta)[lane]);
    }
    return digits_lost;
  }

  // The numbers of the query at a position.
  template <class T>
  bool load_numbers(const Tile& tile, int64_t position, float& base, float& delta) {
    const int64_t token = p_.query_token(tile, position);
    const T* out = p_.out.at<const T>(tile.batch, tile.head, token);
    const T* grad = backward_.grad_out.at<const T>(tile.batch, tile.head, token);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < p_.value_dim; ++d) sum += to_float(out[d]) * to_float(grad[d]);
    const float lse = *p_.lse.at<float>(tile.batch, tile.head, token);
    base = lse == -kInfinity ? 0.0f : lse * kLog2e;
    delta = sum - *backward_.grad_lse.at<float>(tile.batch, tile.head, token);
    return lse != -kInfinity && !(std::abs(lse) <= kLargestLse);
  }

  template <class T>
  void load_few(LoadedTile& loaded, const KeyHead& head) {
    Few& few = loaded.few;
    const Tile& tile = loaded.tile;
    const int count = loaded.queries(), key_vecs = vecs_for(p_.head_dim), value_vecs = vecs_for(p_.value_dim);
    few.queries = take(count * key_vecs);
    few.grads = take(count * value_vecs);
    few.grad_query = take(count * key_vecs);
    std::fill_n(few.grad_query, count * key_vecs, Vec{});
    bool digits_lost = false;
    for (int i = 0; i < count; ++i) {
      const int64_t token = p_.query_token(tile, tile.first + i);
      load_row(p_.query.at<const T>(tile.batch, tile.head, token), p_.head_dim, few.queries + i * key_vecs);
      load_row(backward_.grad_out.at<const T>(tile.batch, tile.head, token), p_.value_dim, few.grads + i * value_vecs);
      few.factor[i] = 1.0f;
      digits_lost |= load_numbers<T>(tile, tile.first + i, few.base[i], few.delta[i]);
    }
    if (digits_lost) renormalise_few(loaded, head);
  }

  // Computes the softmax of a few queries again, where the lse has too few digits.
  void renormalise_few(LoadedTile& loaded, const KeyHead& head) {
    Few& few = loaded.few;
    RowSoftmax softmax[kMostFewQueries];
    const KeyStream from_start = loaded.stream;
    while (const int count = take_keys(loaded, head.rows(), head)) {
      find_rows(count, head);
      for (int i = 0; i < loaded.queries(); ++i) {
        Vec scores[kChunkVecs];
        score(few, i, count, scores);
        softmax[i].weigh(scores, count);
      }
    }
    loaded.stream = from_start;
    for (int i = 0; i < loaded.queries(); ++i) {
      const float sum = softmax[i].sum;
      few.base[i] = softmax[i].base();
      few.factor[i] = sum == 0.0f ? 0.0f : sum <= kLargest ? 1.0f / sum : NAN;
    }
  }

  // Computes the softmax of a tile again, where the lse has too few digits.
  void renormalise(LoadedTile& loaded, const KeyHead& head) {
    Softmax softmax[kTileStrips];
    for (int s = 0; s < loaded.strips; ++s) softmax[s].clear();
    const KeyStream from_start = loaded.stream;
    while (const int count = take_keys(loaded, head.rows(), head)) {
      const Keys keys = pack_keys(count, head);
      for (int s = 0; s < loaded.strips; ++s) {
        with_vecs(loaded.strip[s].vecs(), [&](auto vecs) {
          Vec top[vecs], decay[vecs], *scores = unpaired_weights_.get();
          const Vec* queries = loaded.strip[s].queries;
          compute_scores<Products, vecs>(softmax[s], keys, queries, p_.scale * kLog2e, scores, top);
          compute_weights<Products, vecs>(softmax[s], count, scores, top, decay);
        });
      }
    }
    loaded.stream = from_start;
    for (int s = 0; s < loaded.strips; ++s) {
      Strip& strip = loaded.strip[s];
      for (int v = 0; v < strip.vecs(); ++v) {
        const Vec sum = softmax[s].sum[v];
        strip.base[v] = base_of(softmax[s].max[v]);
        // If the sum is not finite, all weights are NaN; if no key was visible, all are 0.
        strip.factor[v] = sum == 0.0f ? Vec{} : sum <= kLargest ? 1.0f / sum : splat(NAN);
      }
    }
  }

  // ---- Keys

  // Adds the tile's gradients for the rows before `end`, or for all rows if it does not read them in order.
  void run_segment(LoadedTile& loaded, int64_t end, const KeyHead& head) {
    while (const int count = take_keys(loaded, loaded.rises ? end : head.rows(), head)) {
      if (loaded.strips == 0) {
        add_few_grads(loaded, count, head);
        continue;
      }
      const Keys keys = pack_keys(count, head);
      pack_values(count, head);
      for (int s = 0; s < loaded.strips; ++s) {
        with_vecs(loaded.strip[s].vecs(), [&](auto vecs) { add_query_grads<vecs>(loaded.strip[s], s, keys); });
      }
      add_key_grads(loaded, count, head);
    }
  }

  // The rows of the next keys before `end`, and their bias; returns their number, up to a chunk.
  int take_keys(LoadedTile& loaded, int64_t end, const KeyHead& head) {
    const float* bias = p_.key_bias.data ? p_.key_bias.at<float>(loaded.tile.batch, loaded.tile.head) : nullptr;
    int count = 0;
    return loaded.stream.take_while(kChunkKeys, [&](int32_t token) {
      const int32_t row = head.row_of(token);
      if (row >= end) return false;
      rows_[count] = row;
      bias_[count++] = bias ? bias[token] * kLog2e : 0.0f;
      return true;
    });
  }

  Keys pack_keys(int count, const KeyHead& head) {
    auto row_of = [&](int64_t i) { return head.key(rows_[i]); };
    for_each_row(count, key_words_, row_of, [&](int64_t i) {
      std::copy_n(row_of(i), key_words_, floats(keys_) + i * key_words_);
    });
    return {count, key_words_, floats(keys_), bias_};
  }

  void pack_values(int count, const KeyHead& head) {
    auto row_of = [&](int64_t i) { return head.value(rows_[i]); };
    for_each_row(count, value_words_, row_of, [&](int64_t i) {
      std::copy_n(row_of(i), value_words_, floats(values_) + i * value_words_);
    });
    if constexpr (kPaired) {
      auto key_row = [&](int64_t i) { return reinterpret_cast<const BFloat16*>(floats(keys_) + i * key_words_); };
      Products::pack_values(count, p_.head_dim, key_row, floats(key_columns_));
    }
  }

  // ---- Gradients

  // The gradients of the queries of strip s; keeps its weights for the gradients of the keys.
  template <int Vecs>
  void add_query_grads(const Strip& strip, int s, const Keys& keys) {
    Vec* weights = kPaired ? unpaired_weights_.get() : weights_of(s);
    Vec* d_scores = kPaired ? unpaired_d_scores_.get() : d_scores_of(s);
    differentiate<Products, Vecs>(strip, keys, floats(values_), value_words_, p_.scale * kLog2e, weights, d_scores);
    if constexpr (kPaired) {
      pack_query_words<Products, Vecs>(keys.count, weights, weights_of(s));
      pack_query_words<Products, Vecs>(keys.count, d_scores, d_scores_of(s));
      pack_key_words<Products, Vecs>(keys.count, d_scores);
    }
    Vec ones[Vecs];
    std::fill_n(ones, Vecs, splat(1.0f));
    const float* values = kPaired ? floats(key_columns_) : keys.rows;
    Products::template add_values<Vecs>(values, p_.head_dim, keys.count, d_scores, ones, strip.grad_query);
  }

  void add_key_grads(const LoadedTile& loaded, int count, const KeyHead& head) {
    QuerySum key_parts[kTileStrips], value_parts[kTileStrips];
    for (int s = 0; s < loaded.strips; ++s) {
      const Strip& strip = loaded.strip[s];
      const int64_t words = query_words<Products>(strip.vecs());
      key_parts[s] = {reinterpret_cast<const float*>(d_scores_of(s)), strip.query_lines, words};
      value_parts[s] = {reinterpret_cast<const float*>(weights_of(s)), strip.grad_lines, words};
    }
    add_sums(value_parts, loaded.strips, count, p_.value_dim, [&](int64_t i) { return head.grad_value(rows_[i]); });
    add_sums(key_parts, loaded.strips, count, p_.head_dim, [&](int64_t i) { return head.grad_key(rows_[i]); });
  }

  // Adds to row_of(i), for each key i of a chunk, the sum over the queries of all parts.
  template <class RowOf>
  void add_sums(QuerySum* parts, int strips, int count, int64_t dim, RowOf row_of) {
    for (int first = 0; first < vecs_for(dim); first += kVecs) {
      with_vecs(std::min(kVecs, vecs_for(dim) - first), [&](auto vecs) {
        auto add = [&](int64_t i, const Vec* sums) __attribute__((always_inline)) {
          Vec* row = row_of(i) + first;
          UNROLL for (int v = 0; v < vecs; ++v) row[v] += sums[v];
        };
        Products::template sum_over_queries<vecs>(count, parts, strips, add);
        for (int s = 0; s < strips; ++s) parts[s].right += parts[s].words * vecs;
      });
    }
  }

  // ---- Gradients of a few queries

  // The rows of a chunk's keys and values. The padding of the last vector of scores is hidden.
  void find_rows(int count, const KeyHead& head) {
    for (int i = 0; i < round_up(count, kLanes); ++i) {
      const int32_t row = rows_[std::min(i, count - 1)];
      few_keys_.at[i] = reinterpret_cast<const Packed*>(head.key(row));
      few_values_.at[i] = reinterpret_cast<const Packed*>(head.value(row));
      if (i >= count) bias_[i] = -kInfinity;
    }
  }

  // The scores of query i with the chunk's keys; -inf for hidden keys, even if they are not finite.
  void score(const Few& few, int i, int count, Vec* scores) const {
    few_keys_.multiply(few.queries + i * vecs_for(p_.head_dim), count, scores);
    add_bias(scores, p_.scale * kLog2e, bias_, count);
  }

  void add_few_grads(LoadedTile& loaded, int count, const KeyHead& head) {
    Few& few = loaded.few;
    const int queries = loaded.queries(), key_vecs = vecs_for(p_.head_dim), value_vecs = vecs_for(p_.value_dim);
    Vec* weights = weights_.get();
    Vec* d_scores = d_scores_.get();
    find_rows(count, head);
    for (int i = 0; i < queries; ++i) {
      Vec* row = weights + i * kChunkVecs;
      Vec* d_row = d_scores + i * kChunkVecs;
      score(few, i, count, row);
      few_values_.multiply(few.grads + i * value_vecs, count, d_row);
      for (int v = 0; v < vecs_for(count); ++v) {
        row[v] = exp2(row[v] - few.base[i]) * few.factor[i];
        d_row[v] = row[v] * (d_row[v] - few.delta[i]);
      }
    }
    const float* factors = reinterpret_cast<const float*>(d_scores);
    few_keys_.add_to(few.grad_query, queries, factors, kChunkKeys, count);
    for (int i = 0; i < count; ++i) {
      add_few(head.grad_key(rows_[i]), key_vecs, factors + i, queries, few.queries);
      add_few(head.grad_value(rows_[i]), value_vecs, reinterpret_cast<const float*>(weights) + i, queries, few.grads);
    }
  }

  // row += sum over the queries of factors[query * kChunkKeys] * rows[query]
  static void add_few(Vec* row, int vecs, const float* factors, int queries, const Vec* rows) {
    for (int v = 0; v < vecs; v += kVecs) {
      with_vecs(std::min(kVecs, vecs - v), [&](auto some) {
        constexpr int Vecs = some;
        Vec sums[1][Vecs];
        UNROLL for (int j = 0; j < Vecs; ++j) sums[0][j] = row[v + j];
        multiply<Fp32, 1, Vecs>(sums, factors, 0, kChunkKeys, rows + v, queries, vecs);
        UNROLL for (int j = 0; j < Vecs; ++j) row[v + j] = sums[0][j];
      });
    }
  }

  template <class T>
  void store_few(const LoadedTile& loaded) {
    const Tile& tile = loaded.tile;
    const float* row = reinterpret_cast<const float*>(loaded.few.grad_query);
    for (int64_t position = tile.first; position < tile.last; ++position) {
      T* grad = backward_.grad_query.at<T>(tile.batch, tile.head, p_.query_token(tile, position));
      for (int64_t d = 0; d < p_.head_dim; ++d) grad[d] = from_float<T>(row[d] * p_.scale);
      row += vecs_for(p_.head_dim) * kLanes;
    }
  }

  template <class T>
  void store(const LoadedTile& loaded) {
    if (loaded.strips == 0) return store_few<T>(loaded);
    const Tile& tile = loaded.tile;
    for (int64_t position = tile.first; position < tile.last; ++position) {
      const Strip& strip = loaded.strip[(position - tile.first) / kStripQueries];
      const int64_t lane = (position - tile.first) % kStripQueries, width = strip.vecs() * kLanes;
      const float* column = reinterpret_cast<const float*>(strip.grad_query) + lane;
      T* grad = backward_.grad_query.at<T>(tile.batch, tile.head, p_.query_token(tile, position));
      for (int64_t d = 0; d < p_.head_dim; ++d) grad[d] = from_float<T>(column[d * width] * p_.scale);
    }
  }

  Vec* weights_of(int s) const { return weights_.get() + s * kRowsVecs; }
  Vec* d_scores_of(int s) const { return d_scores_.get() + s * kRowsVecs; }

  const BackwardProblem& backward_;
  const Problem& p_;
  const int64_t key_words_, value_words_, key_rows_, batch_vecs_;
  std::unique_ptr<Vec[]> batch_memory_, weights_, d_scores_, keys_, values_, key_columns_;
  std::unique_ptr<Vec[]> unpaired_weights_, unpaired_d_scores_;  // those of one strip, in fp32
  Products products_;
  std::vector<LoadedTile> batch_;
  Vec* free_ = nullptr;  // start of the free part of the batch's memory
  int32_t rows_[kChunkKeys];
  float bias_[kChunkKeys];
  Rows<Packed, kChunkKeys> few_keys_, few_values_;
};

// ---- Shares ----------------------------------------------------------------------------------------------

// The tiles first..last, all of one key head and one share.
struct Piece {
  int64_t batch, kv_head, share, first, last;
};

// Cuts the tiles, in their order, into shares of about the same cost, and shares at the bounds of key heads.
template <class Products>
std::vector<Piece> plan_pieces(const Problem& p, const std::vector<Tile>& tiles) {
  auto cost = [](const Tile& tile) {
    constexpr int64_t kOverhead = 8;  // overhead of a key, in queries, and of a query, in keys
    const int64_t queries = tile.last - tile.first;
    return double((queries <= Products::kFewQueries ? queries : round_up(queries, kLanes)) + kOverhead) *
           (tile.keys + kOverhead);
  };
  double total = 0.0, before = 0.0;
  for (const Tile& tile : tiles) total += cost(tile);
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < int64_t(tiles.size()); ++i) {
    const Tile& tile = tiles[i];
    const int64_t share = (before + cost(tile) / 2) / total * p.threads, kv_head = p.kv_head(tile.head);
    before += cost(tile);
    const Piece* last = pieces.empty() ? nullptr : &pieces.back();
    if (!last || last->share != share || last->batch != tile.batch || last->kv_head != kv_head) {
      pieces.push_back({tile.batch, kv_head, share, i, i});
    }
    pieces.back().last = i + 1;
  }
  return pieces;
}

// Writes the gradients of one key head in the rows first..last: the sum over all pieces, in their order.
template <class T>
void store_key_grads(const BackwardProblem& problem, int64_t batch, int64_t head, int64_t first, int64_t last,
                     const std::vector<const KeyHead*>& pieces) {
  const Problem& p = problem.forward;
  auto store = [&](T* grad, int64_t dim, float scale, auto row_of) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      Vec sum{};
      for (const KeyHead* piece : pieces) sum += row_of(piece)[d / kLanes];
      sum *= scale;
      const int64_t count = std::min<int64_t>(kLanes, dim - d);
      for (int64_t i = 0; i < count; ++i) grad[d + i] = from_float<T>(reinterpret_cast<const float*>(&sum)[i]);
    }
  };
  for (int64_t row = first; row < last; ++row) {
    const int64_t token = pieces.empty() ? row : pieces[0]->token_of(row);
    store(problem.grad_key.at<T>(batch, head, token), p.head_dim, p.scale,
          [&](const KeyHead* piece) { return piece->grad_key(row); });
    store(problem.grad_value.at<T>(batch, head, token), p.value_dim, 1.0f,
          [&](const KeyHead* piece) { return piece->grad_value(row); });
  }
}

template <class Products, class T>
bool run(const BackwardProblem& problem) {
  const Problem& p = problem.forward;
  if (!table_fits(p)) return false;
  std::vector<Tile> tiles = plan_tiles(p);
  const std::vector<Piece> pieces = plan_pieces<Products>(p, tiles);
  const int64_t heads = p.batch * p.kv_heads, keys = p.kv_tokens;
  std::vector<std::vector<int64_t>> of_head(heads), of_share(p.threads);  // the pieces of each, by number
  for (int64_t i = 0; i < int64_t(pieces.size()); ++i) {
    of_head[pieces[i].batch * p.kv_heads + pieces[i].kv_head].push_back(i);
    of_share[pieces[i].share].push_back(i);
  }
  auto new_head = [&] {
    return std::make_unique<KeyHead>(keys, row_words<Products>(p.head_dim), row_words<Products>(p.value_dim),
                                     p.head_dim, p.value_dim);
  };
  std::vector<std::unique_ptr<KeyHead>> parts(pieces.size());  // parts of heads that are divided
#pragma omp parallel num_threads(p.threads)
  {
    Worker<Products> worker(problem);
    std::unique_ptr<KeyHead> own;
#pragma omp for schedule(dynamic, 1)
    for (int64_t share = 0; share < p.threads; ++share) {
      for (const int64_t i : of_share[share]) {
        const Piece& piece = pieces[i];
        const bool whole = of_head[piece.batch * p.kv_heads + piece.kv_head].size() == 1;
        std::unique_ptr<KeyHead>& head = whole ? own : parts[i];
        if (!head) head = new_head();
        head->template load<Products, T>(p, piece.batch, piece.kv_head);
        worker.template run<T>(tiles.data() + piece.first, tiles.data() + piece.last, *head);
        if (whole) store_key_grads<T>(problem, piece.batch, piece.kv_head, 0, keys, {head.get()});
      }
    }
    for (int64_t i = 0; i < heads; ++i) {
      if (of_head[i].size() == 1) continue;
      std::vector<const KeyHead*> divided;
      for (const int64_t piece : of_head[i]) divided.push_back(parts[piece].get());
      constexpr int64_t kRows = 64;
#pragma omp for nowait
      for (int64_t first = 0; first < keys; first += kRows) {
        const int64_t last = std::min(first + kRows, keys);
        store_key_grads<T>(problem, i / p.kv_heads, i % p.kv_heads, first, last, divided);
      }
    }
  }
  return true;
}

}  // namespace

extern "C" bool sparsify_attention_backward(const BackwardProblem* problem) {
  return with_types(problem->forward.dtype, [&](auto types) {
    return run<typename decltype(types)::Products, typename decltype(types)::Element>(*problem);
  });
}
