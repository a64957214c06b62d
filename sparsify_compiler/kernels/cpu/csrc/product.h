// Products of a few rows of words with a line of vectors, with sums in registers.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "vector.h"

constexpr int kSums = kRegisters == 32 ? 24 : 12;  // registers that hold sums in a product

// sums[r][v] += sum over i < words of left[r * row_stride + i * step] * right[i * line_stride + v]
template <class Math, int Rows, int Vecs>
ALWAYS_INLINE void multiply(Vec (&sums)[Rows][Vecs], const float* left, int64_t row_stride, int64_t step,
                     const Vec* right, int64_t words, int64_t line_stride = Vecs) {
  for (int64_t i = 0; i < words; ++i, left += step, right += line_stride) {
    Vec line[Vecs];
    UNROLL for (int v = 0; v < Vecs; ++v) line[v] = right[v];
    UNROLL for (int r = 0; r < Rows; ++r) {
      const float word = left[r * row_stride];
      UNROLL for (int v = 0; v < Vecs; ++v) sums[r][v] = Math::multiply_add(sums[r][v], word, line[v]);
    }
  }
}

// Calls body(constant number of rows, first row) until `rows` rows are covered, as many at a time as registers for
// their sums allow.
template <int Vecs, class Body>
inline void for_row_groups(int64_t rows, Body body) {
  constexpr int kMost = std::min(12, kSums / Vecs);
  int64_t first = 0;
  auto cover = [&](auto count) {
    for (; rows - first >= count; first += count) body(count, first);
  };
  cover(std::integral_constant<int, kMost>{});
  cover(std::integral_constant<int, 4>{});
  cover(std::integral_constant<int, 2>{});
  cover(std::integral_constant<int, 1>{});
}
