// How the caller describes a tensor.

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
