// The C interface of the kernels: the description of a problem that each one takes, and its function.
//
// A function returns false, and computes nothing, if an index lies outside the tensor that it indexes. A tensor that is
// not there has no data.

#pragma once

#include <cstdint>

#include "view.h"

struct Problem;

// Each block of keys as one virtual key: see kernels/far_field/virtual_keys.py. `left` and `keys` have data where a row
// may read some keys of a block: the numbers of keys that a row leaves unread, and of visible keys of a block. Then
// `bounds` has the blocks.
struct FarField {
  View key, value, bias, matrices, limits;
  int64_t heads, blocks;
  View left, keys, bounds;

  // The share of a block that a row leaves unread. A number larger than the block counts as all of its keys.
  float unread(int64_t b, int64_t h, int64_t row, int64_t block) const {
    const int32_t* bound = bounds.at<const int32_t>(b, h) + block;
    const int32_t left_of = left.at<const int32_t>(b, h, row)[block], size = bound[1] - bound[0];
    const int32_t visible = keys.at<const int32_t>(b, h)[block];
    return float(left_of < size ? left_of : size) / float(visible > 1 ? visible : 1);
  }
};

// `with_far_field.cpp`: attention with a far field from beginning to end, in one call. A row of `report` has the density,
// the gate, the recall and the estimated mass of a head: see kernels/far_field/__init__.py.
struct WithFarField {
  const Problem* problem;
  View bounds, order;  // the blocks that virtual keys approximate
  View left, keys;     // as in FarField
  View report;
  int64_t groups, blocks, sampled_rows;
  int64_t best;    // with min_gain, the number of other blocks that a row reads, those of largest gain
  float min_gain;  // negative where no block is read for its gain
  int32_t linear;  // whether there is a first order
};

// `far_field.cpp`: the merge of near and far field.
struct Merge {
  View query, near_out, near_lse, far_out, far_lse, matrices, limits, q_bounds, q_order, out, lse;
  int64_t batch, heads, tokens, q_blocks, head_dim, value_dim;
  float scale;
  int32_t dtype, threads;
};

// `statistics.cpp`. Results that are not needed have no data; without values, value_dim is 0.
struct Statistics {
  View key, value, bounds, order, key_bias;
  View log_weight, key_mean, key_mean_square, value_mean, key_variance, value_variance, covariance;
  int64_t batch, heads, kv_heads, tokens, blocks, head_dim, value_dim;
  int32_t dtype, threads;
};

// `tables.cpp`, as is the next.
struct PairsRead {
  View q_bounds, kv_bounds, kv_num_blocks, kv_indices, pairs;
  int64_t batch, heads, rows, width, blocks;
  int32_t threads;
};

struct KeysLeft {
  View keys, block_of_key, counts, indices, left;
  int64_t batch, heads, rows, width, blocks, tokens;
  int32_t threads;
};

// `clustering.cpp`, as are the next two. Points start from centroids `from`, or where it has no data from the tokens
// `start` (int64). Results that are not needed have no data: `order`, `bounds` and `sizes` are those of
// `clustering.Side`, `order` and `bounds` for `copies` heads of each of the points'.
struct KMeans {
  View points, from, start;
  View centroids, labels, order, bounds, sizes;
  int64_t batch, heads, tokens, clusters, head_dim, before, after, copies;
  int32_t iterations, dtype, threads;
  const KMeans* other;  // points of the same type that are clustered in the same phases; null without
};

struct Sort {
  View labels, order, bounds;
  int64_t batch, heads, tokens, clusters;
  int32_t threads;
};

struct TopP {
  View q_centroids, kv_centroids, kv_sizes, kv_num_blocks, kv_indices, kept;
  int64_t batch, heads, kv_heads, rows, clusters, head_dim;
  int64_t floor;  // least number of clusters to keep
  double top_p;
  float scale;
  int32_t threads;
};

// `prediction.cpp`. q_bounds and key_bias may have no data.
struct TopK {
  View query, key, budget, q_bounds, key_bias, kv_num_blocks, kv_indices;
  int64_t batch, heads, kv_heads, queries, groups, tokens, rank, width;
  float scale;
  int32_t dtype, threads;
};

extern "C" {
bool sparsify_attention(const Problem* problem, const FarField* far);  // `far` is null without a far field
bool sparsify_attention_with_far_field(const WithFarField* problem);
bool sparsify_merge_far_field(const Merge* problem);
bool sparsify_block_statistics(const Statistics* problem);
bool sparsify_pairs_read(const PairsRead* problem);
bool sparsify_keys_left(const KeysLeft* problem);
bool sparsify_kmeans(const KMeans* problem);
bool sparsify_sort_by_label(const Sort* problem);
bool sparsify_top_p_blocks(const TopP* problem);
bool sparsify_top_k_keys(const TopK* problem);
}
