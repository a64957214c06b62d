// Counts over the rows of tables, as kernels/statistics/__init__.py defines them.

#include <cstdint>

#include "check.h"
#include "interface.h"
#include "phases.h"

namespace {

// Calls body(batch, head) for all heads; one thread does a little work alone.
template <class Body>
void for_heads(int64_t batch, int64_t heads, int64_t steps_of_head, int threads, Body body) {
  const int64_t all = batch * heads;
  Phases phases(1);
#pragma omp parallel num_threads(threads_for(all * steps_of_head, threads))
  phases.run(0, all, [&](int64_t i) { body(i / heads, i % heads); });
}

// Whether each row lists at most `width` numbers, all in 0..limit-1.
bool rows_fit(const View& counts, const View& indices, int64_t batch, int64_t heads, int64_t rows, int64_t width,
              int64_t limit) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t row = 0; row < rows; ++row) {
        const int32_t listed = counts.at<const int32_t>(b, h)[row];
        if (listed < 0 || listed > width) return false;
        if (!all_below(indices.at<const int32_t>(b, h, row), listed, limit)) return false;
      }
    }
  }
  return true;
}

}  // namespace

extern "C" bool sparsify_pairs_read(const PairsRead* problem) {
  const PairsRead& p = *problem;
  if (!rows_fit(p.kv_num_blocks, p.kv_indices, p.batch, p.heads, p.rows, p.width, p.blocks)) return false;
  for_heads(p.batch, p.heads, p.rows * p.width, p.threads, [&](int64_t b, int64_t h) {
    const int32_t *q_bounds = p.q_bounds.at<const int32_t>(b, h), *bounds = p.kv_bounds.at<const int32_t>(b, h);
    for (int64_t row = 0; row < p.rows; ++row) {
      const int32_t *listed = p.kv_indices.at<const int32_t>(b, h, row), count = p.kv_num_blocks.at<const int32_t>(b, h)[row];
      int64_t keys = 0;
      for (int32_t i = 0; i < count; ++i) keys += bounds[listed[i] + 1] - bounds[listed[i]];
      p.pairs.at<int64_t>(b, h)[row] = keys * (q_bounds[row + 1] - q_bounds[row]);
    }
  });
  return true;
}

extern "C" bool sparsify_keys_left(const KeysLeft* problem) {
  const KeysLeft& p = *problem;
  const int32_t* block_of = p.block_of_key.at<const int32_t>(0, 0);
  if (!all_below(block_of, p.tokens, p.blocks) ||
      !rows_fit(p.counts, p.indices, p.batch, p.heads, p.rows, p.width, p.tokens)) {
    return false;
  }
  for_heads(p.batch, p.heads, p.rows * p.width, p.threads, [&](int64_t b, int64_t h) {
    for (int64_t row = 0; row < p.rows; ++row) {
      int32_t* left = p.left.at<int32_t>(b, h, row);
      std::copy_n(p.keys.at<const int32_t>(b, h), p.blocks, left);
      const int32_t *listed = p.indices.at<const int32_t>(b, h, row), count = p.counts.at<const int32_t>(b, h)[row];
      for (int32_t i = 0; i < count; ++i) --left[block_of[listed[i]]];
    }
  });
  return true;
}
