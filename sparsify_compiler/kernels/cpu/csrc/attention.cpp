// Block-sparse attention on the CPU: flash attention over the keys that a block table lists.
//
// Work is cut into tiles of up to kTileQueries queries of one query block; threads take tiles, costly ones
// first. A tile goes through its keys in chunks: whatever the table lists, long ranges or single tokens, in
// any order, is gathered into one dense chunk, so products never see the table. A tile is a few strips, each
// as many queries as fit side by side in the lanes of kVecs vectors, and everything about a strip is stored
// with its queries as lanes:
//
//     scores[key][query] = sum over d of keys[key][d] * queries[d][query]
//     out[d][query]     += sum over key of values[key][d] * exp2(scores[key][query] - max[query])
//
// So keys and values enter both products one broadcast word at a time, in the layout they have in memory (no
// transpose), the softmax needs no sum across lanes, and what is not finite stays in the lane it belongs to.
// With AMX the products of bf16 are those of tiles (amx.h), of the same operands; nothing else differs.
// Scores are in units of log2(e), which turns exp into exp2.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "view.h"
#include "product.h"
#include "amx.h"

namespace {

constexpr int kVecs = kRegisters == 32 ? 4 : 2;
constexpr int kStripQueries = kVecs * kLanes;
constexpr int kTileStrips = 4;
constexpr int kTileQueries = kTileStrips * kStripQueries;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

// ---- The problem, as the caller describes it -------------------------------------------------------------

struct Problem {
  View query, key, value, out, lse, key_bias;
  View q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order;
  int64_t batch, heads, kv_heads, q_blocks, head_dim, value_dim;
  float scale;
  int32_t dtype, threads;
};

// ---- Tiles and the keys they read ------------------------------------------------------------------------

// Positions first..last of query block `block`.
struct Tile {
  int64_t batch, head, block, first, last, cost;
};

// The tokens listed in one row of the table, a chunk at a time.
class KeyStream {
 public:
  KeyStream(const Problem& p, int64_t b, int64_t h, int64_t block)
      : bounds_(p.kv_bounds.at<int32_t>(b, h)),
        order_(p.kv_order.data ? p.kv_order.at<int32_t>(b, h) : nullptr),
        next_(p.kv_indices.at<int32_t>(b, h, block)),
        end_(next_ + *p.kv_num_blocks.at<int32_t>(b, h, block)) {}

  int64_t count() const {
    int64_t keys = 0;
    for (const int32_t* at = next_; at != end_; ++at) keys += bounds_[*at + 1] - bounds_[*at];
    return keys;
  }

  // Writes up to `most` tokens and returns how many; 0 at the end.
  int take(int32_t* tokens, int most) {
    int taken = 0;
    while (taken < most && (position_ < block_end_ || open_next_block())) {
      const int count = std::min<int64_t>(most - taken, block_end_ - position_);
      for (int i = 0; i < count; ++i, ++position_) tokens[taken++] = order_ ? order_[position_] : position_;
    }
    return taken;
  }

 private:
  bool open_next_block() {
    while (next_ != end_) {
      const int32_t block = *next_++;
      position_ = bounds_[block], block_end_ = bounds_[block + 1];
      if (position_ < block_end_) return true;
    }
    return false;
  }

  const int32_t *bounds_, *order_, *next_, *end_;
  int32_t position_ = 0, block_end_ = 0;
};

std::vector<Tile> plan_tiles(const Problem& p) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int32_t* bounds = p.q_bounds.at<int32_t>(b, h);
      for (int64_t block = 0; block < p.q_blocks; ++block) {
        const int64_t keys = KeyStream(p, b, h, block).count();
        for (int64_t first = bounds[block]; first < bounds[block + 1]; first += kTileQueries) {
          const int64_t last = std::min<int64_t>(first + kTileQueries, bounds[block + 1]);
          tiles.push_back({b, h, block, first, last, (last - first) * keys});
        }
      }
    }
  }
  // Head by head, whose keys then stay in the caches; in a head the longest first, so that all threads end at
  // about the same time.
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) {
    return std::tie(x.batch, x.head, y.cost) < std::tie(y.batch, y.head, x.cost);
  });
  return tiles;
}

// ---- Chunks, strips and their products -------------------------------------------------------------------

// Keys and values of one chunk, packed, and the bias of its keys.
struct Chunk {
  int count;
  int64_t key_words, value_dim;
  const float *keys, *values, *bias;
};

// The state of up to kStripQueries queries.
struct Strip {
  int64_t queries_in_use;
  Vec* queries;  // [key_words][Vecs]
  Vec* out;      // [value_dim][Vecs], not yet divided by `sum`
  Vec max[kVecs], sum[kVecs];
};

// The products of a chunk in vector registers: one word of a key or of a value against the vectors of a strip.
template <class Math>
struct InVectors : Math {
  static constexpr int kChunkKeys = 144;
  static constexpr int kRows = 1, kWords = 1;  // of which a product takes multiples

  // scores[key][v] = finish(key, v, key . queries of v)
  template <int Vecs, class Finish>
  static void multiply_keys(const Strip& strip, const Chunk& chunk, Vec* scores, Finish finish) {
    for_row_groups<Vecs>(chunk.count, [&](auto rows, int64_t first) {
      constexpr int Rows = rows;
      Vec sums[Rows][Vecs] = {};
      multiply<Math, Rows, Vecs>(sums, chunk.keys + first * chunk.key_words, chunk.key_words, 1, strip.queries,
                                 chunk.key_words);
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) scores[(first + r) * Vecs + v] = finish(first + r, v, sums[r][v]);
      }
    });
  }

  // out[d][v] = out[d][v] * decay[v] + sum over keys of value[key][d] * weight[key][v]
  template <int Vecs>
  static void add_values(const Strip& strip, const Chunk& chunk, const Vec* weights, const Vec (&decay)[Vecs]) {
    const int64_t words = (chunk.count + Math::kPerWord - 1) / Math::kPerWord;
    for_row_groups<Vecs>(chunk.value_dim, [&](auto rows, int64_t first) {
      constexpr int Rows = rows;
      Vec* out = strip.out + first * Vecs;
      Vec sums[Rows][Vecs];
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) sums[r][v] = out[r * Vecs + v] * decay[v];
      }
      multiply<Math, Rows, Vecs>(sums, chunk.values + first, 1, chunk.value_dim, weights, words);
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) out[r * Vecs + v] = sums[r][v];
      }
    });
  }

  // values[word][d]
  template <class RowOf>
  static void pack_values(int64_t count, int64_t dim, RowOf row_of, float* values) {
    for_each_row(count, dim, row_of, [&](int64_t i) {
      if (i % Math::kPerWord) return;  // packed with the row above
      const auto* below = i + 1 < count ? row_of(i + 1) : nullptr;
      Math::pack_rows(row_of(i), below, dim, values + i / Math::kPerWord * dim);
    });
  }
};

#if defined(HAVE_AMX)
// The same in tiles. An object is the registers of its thread.
struct InTiles : Bf16Pairs {
  static constexpr int kChunkKeys = 256;  // more, as each chunk loads and stores all of `out`
  static constexpr int kRows = amx::kRows, kWords = amx::kWords;

  template <int Vecs, class Finish>
  static void multiply_keys(const Strip& strip, const Chunk& chunk, Vec* scores, Finish finish) {
    amx::for_tiles(chunk.count, [&](auto tiles, int64_t first) {
      Vec* rows = scores + first * Vecs;
      amx::multiply<tiles, Vecs, false>(rows, chunk.keys + first * chunk.key_words, chunk.key_words,
                                        strip.queries, chunk.key_words);
      const int64_t count = std::min<int64_t>(tiles * kRows, chunk.count - first);
      for (int64_t r = 0; r < count; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) rows[r * Vecs + v] = finish(first + r, v, rows[r * Vecs + v]);
      }
    });
  }

  template <int Vecs>
  static void add_values(const Strip& strip, const Chunk& chunk, const Vec* weights, const Vec (&decay)[Vecs]) {
    if (!all_ones(decay)) {  // rare once the largest scores were seen
      for (int64_t d = 0; d < chunk.value_dim; ++d) {
        UNROLL for (int v = 0; v < Vecs; ++v) strip.out[d * Vecs + v] *= decay[v];
      }
    }
    const int64_t words = round_up((chunk.count + 1) / 2, kWords);
    amx::for_tiles(chunk.value_dim, [&](auto tiles, int64_t first) {
      amx::multiply<tiles, Vecs, true>(strip.out + first * Vecs, chunk.values + first * kValueWords,
                                       kValueWords, weights, words);
    });
  }

  // values[d][word]
  template <class RowOf>
  static void pack_values(int64_t count, int64_t dim, RowOf row_of, float* values) {
    for (int64_t first = 0; first < count; first += 2 * kWords) {
      auto row_from = [&](int64_t i) { return row_of(first + i); };
      amx::transpose(count - first, dim, row_from, values + first / 2, kValueWords);
    }
  }

 private:
  static constexpr int kValueWords = kChunkKeys / 2;  // from one row of values to the next

  template <int Vecs>
  static bool all_ones(const Vec (&x)[Vecs]) {
    __mmask16 others = 0;
    for (int v = 0; v < Vecs; ++v) {
      others |= _mm512_cmp_ps_mask((__m512)x[v], (__m512)splat(1.0f), _CMP_NEQ_UQ);
    }
    return others == 0;
  }

  amx::Registers registers_;
};
#endif

// ---- Softmax of a chunk ----------------------------------------------------------------------------------

// scores[key][v] = scale * key . query + bias; returns in `top` the largest of each lane.
template <class Products, int Vecs>
void compute_scores(const Strip& strip, const Chunk& chunk, float scale, Vec* scores, Vec (&top)[Vecs]) {
  Products::template multiply_keys<Vecs>(strip, chunk, scores, [&](int64_t key, int v, Vec product) {
    const Vec score = product * scale + chunk.bias[key];
    top[v] = max(score, top[v]);
    return score;
  });
}

// In place, scores -> packed weights exp2(score - max); raises the strip's max, adds to its sum, and returns
// in `decay` what everything summed before must be multiplied by.
//
// The max is kept finite from above, so that a score of +inf has the weight +inf and not inf - inf; where no
// key was visible yet it is -inf, and 0 is subtracted in its stead.
template <class Products, int Vecs>
void compute_weights(Strip& strip, int keys, Vec* scores, const Vec (&top)[Vecs], Vec (&decay)[Vecs]) {
  Vec base[Vecs], sum[Vecs];
  for (int v = 0; v < Vecs; ++v) {
    const Vec most = top[v] > kLargest ? splat(kLargest) : top[v];
    base[v] = most == -kInfinity ? Vec{} : most;
    decay[v] = exp2(strip.max[v] - base[v]);
    sum[v] = strip.sum[v] * decay[v];
    strip.max[v] = most;
  }
  std::fill_n(scores + keys * Vecs, Vecs, splat(-kInfinity));  // fills up the last word
  int words = 0;
  for (int key = 0; key < keys; key += Products::kPerWord, ++words) {
    UNROLL for (int v = 0; v < Vecs; ++v) {
      Vec weights[2];
      UNROLL for (int i = 0; i < Products::kPerWord; ++i) {
        weights[i] = exp2(scores[(key + i) * Vecs + v] - base[v]);
        sum[v] += weights[i];
      }
      scores[words * Vecs + v] = Products::join(weights);
    }
  }
  // What fills up the last tile weighs nothing.
  std::fill_n(scores + words * Vecs, (round_up(words, Products::kWords) - words) * Vecs, Vec{});
  for (int v = 0; v < Vecs; ++v) strip.sum[v] = sum[v];
}

template <class Products, int Vecs>
void attend(Strip& strip, const Chunk& chunk, float scale, Vec* scores) {
  Vec top[Vecs], decay[Vecs];
  for (int v = 0; v < Vecs; ++v) top[v] = strip.max[v];
  compute_scores<Products, Vecs>(strip, chunk, scale, scores, top);
  compute_weights<Products, Vecs>(strip, chunk.count, scores, top, decay);
  Products::template add_values<Vecs>(strip, chunk, scores, decay);
}

int vecs_of(const Strip& strip) { return (strip.queries_in_use + kLanes - 1) / kLanes; }

template <class Products>
void attend_any(Strip& strip, const Chunk& chunk, float scale, Vec* scores) {
  switch (vecs_of(strip)) {
    case 1: return attend<Products, 1>(strip, chunk, scale, scores);
    case 2: return attend<Products, 2>(strip, chunk, scale, scores);
    case 3: return attend<Products, std::min(3, kVecs)>(strip, chunk, scale, scores);
    default: return attend<Products, kVecs>(strip, chunk, scale, scores);
  }
}

// ---- One thread ------------------------------------------------------------------------------------------

// Runs tiles one after another on scratch memory of its own.
template <class Products, class T>
class Worker {
 public:
  explicit Worker(const Problem& problem)
      : p_(problem),
        key_words_(round_up((p_.head_dim + Products::kPerWord - 1) / Products::kPerWord, Products::kWords)),
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
      const Chunk chunk = pack_chunk(tile, count);
      for (int s = 0; s < strips; ++s) {
        attend_any<Products>(strips_[s], chunk, p_.scale * kLog2e, scores_.get());
      }
    }
    for (int s = 0; s < strips; ++s) store(tile, s);
  }

 private:
  static constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

  int64_t query_token(const Tile& tile, int64_t position) const {
    return p_.q_order.data ? p_.q_order.at<int32_t>(tile.batch, tile.head)[position] : position;
  }

  // Fills the strips of the tile and returns their number.
  int load_queries(const Tile& tile) {
    int strips = 0;
    for (int64_t first = tile.first; first < tile.last; first += kStripQueries, ++strips) {
      Strip& strip = strips_[strips];
      strip.queries_in_use = std::min<int64_t>(kStripQueries, tile.last - first);
      strip.queries = queries_.get() + strips * key_words_ * kVecs;
      strip.out = out_.get() + strips * value_rows_ * kVecs;
      std::fill_n(strip.max, kVecs, splat(-kInfinity));
      std::fill_n(strip.sum, kVecs, Vec{});
      std::fill_n(strip.out, value_rows_ * kVecs, Vec{});
      std::fill_n(strip.queries, key_words_ * kVecs, Vec{});
      const int64_t width = vecs_of(strip) * kLanes;
      float* words = keys();  // free until the first chunk
      auto row_of = [&](int64_t lane) {
        return p_.query.at<const T>(tile.batch, tile.head, query_token(tile, first + lane));
      };
      for_each_row(strip.queries_in_use, p_.head_dim, row_of, [&](int64_t lane) {
        Products::pack_row(row_of(lane), p_.head_dim, words);
        float* column = reinterpret_cast<float*>(strip.queries) + lane;
        for (int64_t i = 0; i < key_words_; ++i) column[i * width] = words[i];
      });
    }
    return strips;
  }

  Chunk pack_chunk(const Tile& tile, int count) {
    const int64_t head = tile.head * p_.kv_heads / p_.heads;
    const float* bias = p_.key_bias.at<const float>(tile.batch, tile.head);
    auto key_row = [&](int64_t i) { return p_.key.at<const T>(tile.batch, head, tokens_[i]); };
    auto value_row = [&](int64_t i) { return p_.value.at<const T>(tile.batch, head, tokens_[i]); };
    for_each_row(count, p_.head_dim, key_row, [&](int64_t i) {
      Products::pack_row(key_row(i), p_.head_dim, keys() + i * key_words_);
      bias_[i] = p_.key_bias.data ? bias[tokens_[i]] * kLog2e : 0.0f;
    });
    Products::pack_values(count, p_.value_dim, value_row, values());
    return {count, key_words_, p_.value_dim, keys(), values(), bias_};
  }

  void store(const Tile& tile, int index) {
    const Strip& strip = strips_[index];
    const int64_t width = vecs_of(strip) * kLanes;
    for (int64_t lane = 0; lane < strip.queries_in_use; ++lane) {
      const int64_t token = query_token(tile, tile.first + index * kStripQueries + lane);
      const float sum = reinterpret_cast<const float*>(strip.sum)[lane];
      const float max = reinterpret_cast<const float*>(strip.max)[lane];
      const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      const float* column = reinterpret_cast<const float*>(strip.out) + lane;
      T* out = p_.out.at<T>(tile.batch, tile.head, token);
      for (int64_t d = 0; d < p_.value_dim; ++d) out[d] = from_float<T>(column[d * width] * factor);
      float* lse = p_.lse.at<float>(tile.batch, tile.head, token);
      *lse = sum == 0.0f ? -kInfinity : (max + std::log2(sum)) * kLn2;
    }
  }

  // Zeros, aligned as vectors are.
  static std::unique_ptr<Vec[]> aligned_floats(int64_t count) {
    return std::unique_ptr<Vec[]>(new Vec[round_up(count, kLanes) / kLanes]());
  }
  float* keys() { return reinterpret_cast<float*>(keys_.get()); }
  float* values() { return reinterpret_cast<float*>(values_.get()); }

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
  const std::vector<Tile> tiles = plan_tiles(problem);
  const int64_t count = tiles.size();
#pragma omp parallel num_threads(problem.threads)
  {
    Worker<Products, T> worker(problem);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) worker.run(tiles[i]);
  }
}

#if defined(__AVX512BF16__)
using BFloat16InVectors = InVectors<Bf16Pairs>;
#else
using BFloat16InVectors = InVectors<Fp32>;
#endif

void run_bfloat16(const Problem& problem) {
#if defined(HAVE_AMX)
  if (amx::granted()) return run<InTiles, BFloat16>(problem);
#endif
  run<BFloat16InVectors, BFloat16>(problem);
}

}  // namespace

extern "C" void sparsify_attention(const Problem* problem) {
  switch (problem->dtype) {
    case kFloat32: return run<InVectors<Fp32>, float>(*problem);
    case kFloat16: return run<InVectors<Fp32>, Half>(*problem);
    case kBFloat16: return run_bfloat16(*problem);
  }
}
