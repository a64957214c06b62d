// Workers that kernels of several files use. A worker has scratch memory of its own and belongs to one thread.

#pragma once

#include <memory>
#include <vector>

#include "interface.h"
#include "problem.h"

// `attention.cpp`: attends one tile at a time.
class TileWorker {
 public:
  virtual ~TileWorker() = default;
  virtual void run(const Tile& tile) = 0;
};

// `far` is null without a far field. Both must outlive the worker.
std::unique_ptr<TileWorker> tile_worker(const Problem& problem, const FarField* far);

// Sorts tiles for threads that take them one after another: head by head, so that a head's keys stay in the caches; in a
// head the longest tile first, so that all threads end at about the same time.
void sort_tiles(std::vector<Tile>& tiles);

// `statistics.cpp`: computes the statistics of one block at a time.
class BlockWorker {
 public:
  virtual ~BlockWorker() = default;
  virtual void run(int64_t batch, int64_t head, int64_t block) = 0;
  // The rows first..first+channels-1 of the covariance of a block whose means are known: out[channels][value_dim].
  virtual void covariance(int64_t batch, int64_t head, int64_t block, int64_t first, int64_t channels, float* out) = 0;
};

std::unique_ptr<BlockWorker> block_worker(const Statistics& problem);
