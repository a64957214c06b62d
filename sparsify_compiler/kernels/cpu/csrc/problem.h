// The common part of attention and its gradients: the caller's description of the problem, its tiles, and the keys
// that a tile reads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "view.h"

// Positions first..last of query block `block`.
struct Tile {
  int64_t batch, head, block, first, last, keys;
};

struct Problem {
  View query, key, value, out, lse, key_bias;
  View q_bounds, kv_bounds, kv_num_blocks, kv_indices, q_order, kv_order;
  int64_t batch, heads, kv_heads, q_tokens, kv_tokens, q_blocks, kv_blocks, width, head_dim, value_dim;
  float scale;
  int32_t dtype, threads;

  int64_t query_token(const Tile& tile, int64_t position) const {
    return q_order.data ? q_order.at<int32_t>(tile.batch, tile.head)[position] : position;
  }
  int64_t kv_head(int64_t head) const { return head * kv_heads / heads; }
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

  // True if the remaining positions only rise.
  bool rises() const { return std::is_sorted(next_, end_); }

  // Continues while accept(token), for up to `most` tokens, and returns their number; 0 at the end.
  template <class Accept>
  int take_while(int most, Accept accept) {
    int taken = 0;
    while (taken < most && (position_ < block_end_ || open_next_block())) {
      if (!accept(order_ ? order_[position_] : position_)) break;
      ++position_, ++taken;
    }
    return taken;
  }

  // Writes up to `most` tokens and returns their number; 0 at the end.
  int take(int32_t* tokens, int most) {
    return take_while(most, [&](int32_t token) {
      *tokens++ = token;
      return true;
    });
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
