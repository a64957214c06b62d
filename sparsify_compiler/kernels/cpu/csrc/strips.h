// Strips: as many queries as the lanes of kVecs vectors hold. Everything with an element for each query of a strip has
// the queries as lanes. So keys and values enter a product one broadcast word at a time, in their layout in memory (no
// transpose), the softmax needs no sum across lanes, and non-finite values stay in their own lane.
//
// With AMX, products of bf16 run in tiles (amx.h), on the same operands; everything else is the same. Scores are in
// units of log2(e), which turns exp into exp2.

#pragma once

#include <algorithm>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "check.h"
#include "problem.h"
#include "product.h"
#include "amx.h"

constexpr int kVecs = kRegisters == 32 ? 4 : 2;
constexpr int kStripQueries = kVecs * kLanes;
constexpr int kTileStrips = 4;
constexpr int kTileQueries = kTileStrips * kStripQueries;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.693147180559945309417f;

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

inline int vecs_for(int64_t elements) { return (elements + kLanes - 1) / kLanes; }

// Calls body(constant number of vectors) for 1 <= vecs <= kVecs.
template <class Body>
ALWAYS_INLINE void with_vecs(int vecs, Body body) {
  switch (vecs) {
    case 1: return body(std::integral_constant<int, 1>{});
    case 2: return body(std::integral_constant<int, 2>{});
    case 3: return body(std::integral_constant<int, std::min(3, kVecs)>{});
    default: return body(std::integral_constant<int, kVecs>{});
  }
}

// Zeros, with the alignment of vectors.
inline std::unique_ptr<Vec[]> aligned_floats(int64_t count) {
  return std::unique_ptr<Vec[]>(new Vec[round_up(count, kLanes) / kLanes]());
}

inline float* floats(const std::unique_ptr<Vec[]>& vecs) { return reinterpret_cast<float*>(vecs.get()); }

// Whether all indices of the table fit.
inline bool table_fits(const Problem& p) {
  if (!bounds_fit(p.q_bounds, p.batch, p.heads, p.q_blocks, p.q_tokens) ||
      !bounds_fit(p.kv_bounds, p.batch, p.heads, p.kv_blocks, p.kv_tokens) ||
      !order_fits(p.q_order, p.batch, p.heads, p.q_tokens) ||
      !order_fits(p.kv_order, p.batch, p.heads, p.kv_tokens)) {
    return false;
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      for (int64_t block = 0; block < p.q_blocks; ++block) {
        const int32_t listed = *p.kv_num_blocks.at<int32_t>(b, h, block);
        if (listed < 0 || listed > p.width) return false;
        if (!all_below(p.kv_indices.at<int32_t>(b, h, block), listed, p.kv_blocks)) return false;
      }
    }
  }
  return true;
}

// Tiles of up to kTileQueries queries of one block each, head by head, of a table that fits.
inline std::vector<Tile> plan_tiles(const Problem& p) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int32_t* bounds = p.q_bounds.at<int32_t>(b, h);
      for (int64_t block = 0; block < p.q_blocks; ++block) {
        if (bounds[block] == bounds[block + 1]) continue;
        const int64_t keys = KeyStream(p, b, h, block).count();
        for (int64_t first = bounds[block]; first < bounds[block + 1]; first += kTileQueries) {
          const int64_t last = std::min<int64_t>(first + kTileQueries, bounds[block + 1]);
          tiles.push_back({b, h, block, first, last, keys});
        }
      }
    }
  }
  return tiles;
}

// ---- Products --------------------------------------------------------------------------------------------

// The keys of a chunk, packed into rows of words, and the bias of each in units of log2(e).
struct Keys {
  int count;
  int64_t words;
  const float *rows, *bias;
};

// One strip's part of a sum over queries: left[row][word] . right[word][v]
struct QuerySum {
  const float* left;
  const Vec* right;
  int64_t words;
};

// In vector registers: one word of a key or of a value against the vectors of a strip.
template <class Math>
struct InVectors : Math {
  static constexpr int kChunkKeys = 144, kBackwardChunkKeys = 48;
  static constexpr int kRows = 1, kWords = 1;  // a product takes multiples of these
  static constexpr int kFewQueries = 8;  // up to this number, channels as lanes (few.h) are faster

  // scores[row][v] = finish(row, v, rows[row] . columns of v)
  template <int Vecs, class Finish>
  static void multiply_rows(const float* rows, int64_t count, int64_t words, const Vec* columns, Vec* scores,
                            Finish finish) {
    for_row_groups<Vecs>(count, [&](auto group, int64_t first) {
      constexpr int Rows = group;
      Vec sums[Rows][Vecs] = {};
      multiply<Math, Rows, Vecs>(sums, rows + first * words, words, 1, columns, words);
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) scores[(first + r) * Vecs + v] = finish(first + r, v, sums[r][v]);
      }
    });
  }

  // out[d][v] = out[d][v] * decay[v] + sum over keys of value[key][d] * weight[key][v]
  template <int Vecs>
  static void add_values(const float* values, int64_t dim, int64_t keys, const Vec* weights,
                         const Vec (&decay)[Vecs], Vec* out) {
    const int64_t words = (keys + Math::kPerWord - 1) / Math::kPerWord;
    for_row_groups<Vecs>(dim, [&](auto rows, int64_t first) {
      constexpr int Rows = rows;
      Vec* group = out + first * Vecs;
      Vec sums[Rows][Vecs] = {};  // only of the chunk: fewer terms in one sum, fewer digits lost
      multiply<Math, Rows, Vecs>(sums, values + first, 1, dim, weights, words);
      UNROLL for (int r = 0; r < Rows; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) {
          group[r * Vecs + v] = group[r * Vecs + v] * decay[v] + sums[r][v];
        }
      }
    });
  }

  // take(row, sum of all parts) for every row
  template <int Vecs, class Take>
  static void sum_over_queries(int64_t rows, const QuerySum* parts, int count, Take take) {
    for_row_groups<Vecs>(rows, [&](auto group, int64_t first) {
      constexpr int Rows = group;
      Vec sums[Rows][Vecs] = {};
      for (int i = 0; i < count; ++i) {
        const auto [left, right, words] = parts[i];
        multiply<Math, Rows, Vecs>(sums, left + first * words, words, 1, right, words);
      }
      UNROLL for (int r = 0; r < Rows; ++r) take(first + r, sums[r]);
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
// The same in tiles. An object represents the registers of its thread.
struct InTiles : Bf16Pairs {
  // More, since each chunk loads and stores all of `out`.
  static constexpr int kChunkKeys = 256, kBackwardChunkKeys = 128;
  static constexpr int kRows = amx::kRows, kWords = amx::kWords;
  static constexpr int kFewQueries = 3;

  template <int Vecs, class Finish>
  static void multiply_rows(const float* rows, int64_t count, int64_t words, const Vec* columns, Vec* scores,
                            Finish finish) {
    amx::for_tiles(count, [&](auto tiles, int64_t first) {
      Vec* group = scores + first * Vecs;
      amx::multiply<tiles, Vecs, false>(group, rows + first * words, words, columns, words);
      const int64_t there = std::min<int64_t>(tiles * kRows, count - first);
      for (int64_t r = 0; r < there; ++r) {
        UNROLL for (int v = 0; v < Vecs; ++v) group[r * Vecs + v] = finish(first + r, v, group[r * Vecs + v]);
      }
    });
  }

  template <int Vecs>
  static void add_values(const float* values, int64_t dim, int64_t keys, const Vec* weights,
                         const Vec (&decay)[Vecs], Vec* out) {
    if (!all_ones(decay)) {  // rare after the largest scores have come
      for (int64_t d = 0; d < dim; ++d) {
        UNROLL for (int v = 0; v < Vecs; ++v) out[d * Vecs + v] *= decay[v];
      }
    }
    const int64_t words = round_up((keys + 1) / 2, kWords);
    amx::for_tiles(dim, [&](auto tiles, int64_t first) {
      amx::multiply<tiles, Vecs, true>(out + first * Vecs, values + first * kValueWords, kValueWords, weights,
                                       words);
    });
  }

  template <int Vecs, class Take>
  static void sum_over_queries(int64_t rows, const QuerySum* parts, int count, Take take) {
    amx::for_tiles(rows, [&](auto tiles, int64_t first) {
      Vec sums[tiles * kRows][Vecs];
      amx::for_columns<Vecs>([&](auto columns, int v) {
        amx::zero_sums<tiles, columns>();
        for (int i = 0; i < count; ++i) {
          const auto [left, right, words] = parts[i];
          amx::add_products<tiles, columns, Vecs>(left + first * words, words, right + v, words);
        }
        amx::store_sums<tiles, columns, Vecs>(sums[0] + v);
      });
      const int64_t there = std::min<int64_t>(tiles * kRows, rows - first);
      for (int64_t r = 0; r < there; ++r) take(first + r, sums[r]);
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
  static constexpr int kValueWords = kChunkKeys / 2;  // distance of two rows of values

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

#if defined(__AVX512BF16__)
using BFloat16InVectors = InVectors<Bf16Pairs>;
#else
using BFloat16InVectors = InVectors<Fp32>;
#endif

template <class P, class T>
struct Types {
  using Products = P;
  using Element = T;
};

// Returns body(Types) with the products and the elements of tensors of `dtype`.
template <class Body>
auto with_types(int32_t dtype, Body body) {
  if (dtype == kFloat32) return body(Types<InVectors<Fp32>, float>{});
  if (dtype == kFloat16) return body(Types<InVectors<Fp32>, Half>{});
#if defined(HAVE_AMX)
  if (amx::granted()) return body(Types<InTiles, BFloat16>{});
#endif
  return body(Types<BFloat16InVectors, BFloat16>{});
}

// ---- Packing ---------------------------------------------------------------------------------------------

// Words of a packed row of `dim` elements.
template <class Products>
int64_t row_words(int64_t dim) {
  return round_up((dim + Products::kPerWord - 1) / Products::kPerWord, Products::kWords);
}

// The rows of a strip's queries -> columns[word][vecs_for(queries)]. `row` is scratch for the words of one row.
template <class Math, class RowOf>
void pack_columns(int64_t queries, int64_t dim, RowOf row_of, float* row, int64_t words, Vec* columns) {
  const int64_t width = vecs_for(queries) * kLanes;
  std::fill_n(columns, words * vecs_for(queries), Vec{});
  for_each_row(queries, dim, row_of, [&](int64_t lane) {
    Math::pack_row(row_of(lane), dim, row);
    float* column = reinterpret_cast<float*>(columns) + lane;
    for (int64_t i = 0; i < words; ++i) column[i * width] = row[i];
  });
}

// ---- Softmax of a chunk ----------------------------------------------------------------------------------

// Softmax of the scores so far, for each query of a strip.
struct Softmax {
  Vec max[kVecs], sum[kVecs];

  void clear() {
    std::fill_n(max, kVecs, splat(-kInfinity));
    std::fill_n(sum, kVecs, Vec{});
  }
};

// scores[key][v] = scale * key . query + bias; returns in `top` the largest of each lane and of `softmax.max`.
template <class Products, int Vecs>
void compute_scores(const Softmax& softmax, const Keys& keys, const Vec* queries, float scale, Vec* scores,
                    Vec (&top)[Vecs]) {
  for (int v = 0; v < Vecs; ++v) top[v] = softmax.max[v];
  Products::template multiply_rows<Vecs>(
      keys.rows, keys.count, keys.words, queries, scores, [&](int64_t key, int v, Vec product) {
        const Vec score = product * scale + keys.bias[key];
        top[v] = max(score, top[v]);
        return score;
      });
}

// The base of exponents: `max`, or 0 where no key was visible yet.
inline Vec base_of(Vec max) { return max == -kInfinity ? Vec{} : max; }

// In place, scores -> packed weights exp2(score - max); raises the softmax's max, adds to its sum, and returns in
// `decay` the factor for all earlier sums.
//
// The max is never +inf, so that a score of +inf has the weight +inf and not inf - inf.
template <class Products, int Vecs>
void compute_weights(Softmax& softmax, int keys, Vec* scores, const Vec (&top)[Vecs], Vec (&decay)[Vecs]) {
  Vec base[Vecs], sum[Vecs] = {};
  for (int v = 0; v < Vecs; ++v) {
    const Vec most = top[v] > kLargest ? splat(kLargest) : top[v];
    base[v] = base_of(most);
    decay[v] = exp2(softmax.max[v] - base[v]);
    softmax.max[v] = most;
  }
  std::fill_n(scores + keys * Vecs, Vecs, splat(-kInfinity));  // pads the last word
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
  // The padding of the last tile has weight 0.
  std::fill_n(scores + words * Vecs, (round_up(words, Products::kWords) - words) * Vecs, Vec{});
  for (int v = 0; v < Vecs; ++v) softmax.sum[v] = softmax.sum[v] * decay[v] + sum[v];
}
