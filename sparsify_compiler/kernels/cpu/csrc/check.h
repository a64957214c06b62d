// Checks that all indices lie inside the tensors that they index. Kernels make these checks before they use an index:
// if one fails, the kernel computes nothing and returns false.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "view.h"

// Calls fits(b, h) for every batch and head with its own row, until one does not fit.
template <class Fits>
inline bool all_fit(const View& rows, int64_t batch, int64_t heads, Fits fits) {
  if (!rows.data) return true;
  const int64_t own_batch = rows.batch ? batch : 1, own_heads = rows.head ? heads : 1;
  for (int64_t b = 0; b < own_batch; ++b) {
    for (int64_t h = 0; h < own_heads; ++h) {
      if (!fits(b, h)) return false;
    }
  }
  return true;
}

// Whether `count` numbers, `stride` apart, all lie in 0..limit-1.
inline bool all_below(const int32_t* numbers, int64_t count, int64_t limit, int64_t stride = 1) {
  uint32_t most = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) most = std::max(most, uint32_t(numbers[i]));
  } else {
    for (int64_t i = 0; i < count; ++i) most = std::max(most, uint32_t(numbers[i * stride]));
  }
  return count == 0 || most < limit;
}

// Whether the bounds of `blocks` blocks go from 0 to `tokens` and never fall.
inline bool bounds_fit(const View& bounds, int64_t batch, int64_t heads, int64_t blocks, int64_t tokens) {
  return all_fit(bounds, batch, heads, [&](int64_t b, int64_t h) {
    const int32_t* row = bounds.at<const int32_t>(b, h);
    bool fits = row[0] == 0 && row[blocks] == tokens;
    for (int64_t i = 0; i < blocks; ++i) fits &= row[i] <= row[i + 1];
    return fits;
  });
}

// Whether each of `tokens` tokens occurs once.
inline bool order_fits(const View& order, int64_t batch, int64_t heads, int64_t tokens) {
  std::vector<uint8_t> seen;
  return all_fit(order, batch, heads, [&](int64_t b, int64_t h) {
    const int32_t* row = order.at<const int32_t>(b, h);
    if (!all_below(row, tokens, tokens)) return false;
    seen.assign(tokens, 0);
    for (int64_t i = 0; i < tokens; ++i) seen[row[i]] = 1;
    return std::find(seen.begin(), seen.end(), 0) == seen.end();
  });
}
