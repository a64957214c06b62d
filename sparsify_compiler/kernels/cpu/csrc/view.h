// The caller's description of a tensor.

#pragma once

#include <cstdint>

enum Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

// Elements in memory: strides of batch, head and row, in elements; the last dimension has stride 1.
struct View {
  void* data;
  int64_t batch, head, row;

  template <class T>
  T* at(int64_t b, int64_t h, int64_t r = 0) const {
    return static_cast<T*>(data) + b * batch + h * head + r * row;
  }
};

constexpr int kRowsAhead = 8;  // rows between the one prefetched and the one read

// Always inline: GCC takes a function that only prefetches for one without effect, and drops calls of it.
template <class T>
inline __attribute__((always_inline)) void prefetch_row(const T* row, int64_t dim) {
  constexpr int kCacheLine = 64;
  for (int64_t d = 0; d < dim; d += kCacheLine / sizeof(T)) __builtin_prefetch(row + d);
}

// Calls body(i) for every row, and prefetches a later row meanwhile: the rows of a head may lie a page apart, where
// hardware does not prefetch.
template <class RowOf, class Body>
inline void for_each_row(int64_t count, int64_t dim, RowOf row_of, Body body) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kRowsAhead < count) prefetch_row(row_of(i + kRowsAhead), dim);
    body(i);
  }
}
