// The merge of near and far field, as kernels/far_field/near_and_far.py defines it.
//
// Threads take tiles of one query block, which share its matrix. The matrix is packed once for a tile, with value
// channels as vector lanes, and multiplied with a few queries at a time.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "check.h"
#include "interface.h"
#include "product.h"

namespace {

constexpr int kTileQueries = 128;
constexpr int kStripVecs = 2;  // vectors of value channels that a product covers at once
constexpr int kStripChannels = kStripVecs * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Positions first..last of query block `block`.
struct Tile {
  int64_t batch, head, block, first, last;
};

std::vector<Tile> plan_tiles(const Merge& p) {
  std::vector<Tile> tiles;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int32_t* bounds = p.q_bounds.at<int32_t>(b, h);
      for (int64_t block = 0; block < p.q_blocks; ++block) {
        for (int64_t first = bounds[block]; first < bounds[block + 1]; first += kTileQueries) {
          tiles.push_back({b, h, block, first, std::min<int64_t>(first + kTileQueries, bounds[block + 1])});
        }
      }
    }
  }
  return tiles;
}

template <class T>
class Worker {
 public:
  explicit Worker(const Merge& problem)
      : p_(problem),
        width_((p_.value_dim + kStripChannels - 1) / kStripChannels * kStripChannels),
        queries_(new float[kTileQueries * p_.head_dim]),
        terms_(new Vec[kTileQueries * width_ / kLanes]),
        strip_(new Vec[p_.head_dim * kStripVecs]) {}

  void run(const Tile& tile) {
    const int32_t* order = p_.q_order.data ? p_.q_order.at<int32_t>(tile.batch, tile.head) : nullptr;
    auto token = [&](int64_t position) -> int64_t { return order ? order[position] : position; };
    const int count = tile.last - tile.first;
    if (p_.matrices.data) {
      auto row_of = [&](int64_t i) { return p_.query.at<const T>(tile.batch, tile.head, token(tile.first + i)); };
      for_each_row(count, p_.head_dim, row_of, [&](int64_t i) {
        const T* __restrict row = row_of(i);
        float* __restrict out = queries_.get() + i * p_.head_dim;
        for (int64_t d = 0; d < p_.head_dim; ++d) out[d] = p_.scale * to_float(row[d]);
      });
      compute_terms(tile, count);
    }
    auto near_of = [&](int64_t i) { return p_.near_out.at<const T>(tile.batch, tile.head, token(tile.first + i)); };
    for_each_row(count, p_.value_dim, near_of, [&](int64_t i) {
      if (i + kRowsAhead < count) {
        const int64_t later = token(tile.first + i + kRowsAhead);
        prefetch_row(p_.far_out.at<const T>(tile.batch, tile.head, later), p_.value_dim);
        prefetch_row(p_.out.at<T>(tile.batch, tile.head, later), p_.value_dim);
      }
      merge_row(tile, token(tile.first + i), i);
    });
  }

 private:
  // terms_[i] = scale * query M, for each query of the tile.
  void compute_terms(const Tile& tile, int count) {
    const float* matrix = p_.matrices.at<float>(tile.batch, tile.head, tile.block);
    for (int64_t channel = 0; channel < p_.value_dim; channel += kStripChannels) {
      const int64_t width = std::min<int64_t>(kStripChannels, p_.value_dim - channel);
      for (int64_t d = 0; d < p_.head_dim; ++d) {
        float* line = reinterpret_cast<float*>(strip_.get() + d * kStripVecs);
        std::copy_n(matrix + d * p_.value_dim + channel, width, line);
        std::fill(line + width, line + kStripChannels, 0.0f);
      }
      for_row_groups<kStripVecs>(count, [&](auto rows, int64_t first) {
        constexpr int Rows = rows;
        Vec sums[Rows][kStripVecs] = {};
        multiply<Fp32, Rows, kStripVecs>(sums, queries_.get() + first * p_.head_dim, p_.head_dim, 1,
                                         strip_.get(), p_.head_dim);
        UNROLL for (int r = 0; r < Rows; ++r) {
          UNROLL for (int v = 0; v < kStripVecs; ++v) {
            terms_[((first + r) * width_ + channel) / kLanes + v] = sums[r][v];
          }
        }
      });
    }
  }

  void merge_row(const Tile& tile, int64_t token, int index) {
    const T* __restrict near = p_.near_out.at<const T>(tile.batch, tile.head, token);
    const T* __restrict far = p_.far_out.at<const T>(tile.batch, tile.head, token);
    const float near_lse = *p_.near_lse.at<float>(tile.batch, tile.head, token);
    const float far_lse = *p_.far_lse.at<float>(tile.batch, tile.head, token);
    T* __restrict out = p_.out.at<T>(tile.batch, tile.head, token);
    float* lse = p_.lse.at<float>(tile.batch, tile.head, token);
    if (far_lse == -kInfinity) {
      std::copy_n(near, p_.value_dim, out);
      *lse = near_lse;
      return;
    }
    const float top = std::max(near_lse, far_lse);
    const float near_weight = std::exp(near_lse - top), far_weight = std::exp(far_lse - top);
    const float total = near_weight + far_weight;
    const float near_share = near_weight / total, far_share = far_weight / total;
    if (p_.matrices.data) {
      const float* __restrict terms = reinterpret_cast<const float*>(terms_.get()) + index * width_;
      const float* __restrict limits = p_.limits.at<float>(tile.batch, tile.head, tile.block);
      for (int64_t d = 0; d < p_.value_dim; ++d) {
        const float term = within(terms[d], limits[d]);
        out[d] = from_float<T>(near_share * to_float(near[d]) + far_share * (to_float(far[d]) + term));
      }
    } else {
      for (int64_t d = 0; d < p_.value_dim; ++d) {
        out[d] = from_float<T>(near_share * to_float(near[d]) + far_share * to_float(far[d]));
      }
    }
    *lse = top + std::log(total);
  }

  const Merge& p_;
  const int64_t width_;  // value channels, padded to whole strips
  std::unique_ptr<float[]> queries_;
  std::unique_ptr<Vec[]> terms_, strip_;
};

template <class T>
bool run(const Merge& problem) {
  if (!bounds_fit(problem.q_bounds, problem.batch, problem.heads, problem.q_blocks, problem.tokens) ||
      !order_fits(problem.q_order, problem.batch, problem.heads, problem.tokens)) {
    return false;
  }
  const std::vector<Tile> tiles = plan_tiles(problem);
  const int64_t count = tiles.size();
#pragma omp parallel num_threads(problem.threads)
  {
    Worker<T> worker(problem);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < count; ++i) worker.run(tiles[i]);
  }
  return true;
}

}  // namespace

extern "C" bool sparsify_merge_far_field(const Merge* problem) {
  switch (problem->dtype) {
    case kFloat32: return run<float>(*problem);
    case kFloat16: return run<Half>(*problem);
    case kBFloat16: return run<BFloat16>(*problem);
  }
  return false;
}
