// Products of bf16 pairs in the tiles of AMX.
//
// A tile register holds 16 rows of 64 bytes. One instruction multiplies two of them,
//
//     sums[row][lane] += sum over word < 16 of left[row][word] * right[word][lane]
//
// where a word is two bf16 that are neighbours in the dimension summed over, and `sums` is fp32. So `right` has the
// same layout as the queries and weights of a strip, [word][lane], one tile wide for each vector of the strip, and a
// row of `sums` is a vector. `left` holds keys as they lie in memory, or transposed values: [channel][word], where a
// word has the channel's values at two neighbouring keys.
//
// Tiles are always full: the padding is zero, or a row of `sums` that is not read.

#pragma once

#include <cstdint>
#include <type_traits>

#include "vector.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define HAVE_AMX

#include <sys/syscall.h>
#include <unistd.h>

namespace amx {

constexpr int kRows = 16, kWords = 16;  // rows and words of a tile

// True if Linux lets this process use tiles. The process must request them.
inline bool granted() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// During its lifetime, the eight tile registers of its thread are 16 rows of 64 bytes.
class Registers {
 public:
  Registers() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Registers() { asm volatile("tilerelease"); }
  Registers(const Registers&) = delete;
};

// Not the compilers' intrinsics: they take the number of a register only as a literal, and GCC does not know that
// their load reads memory.
template <int Tile>
ALWAYS_INLINE void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
ALWAYS_INLINE void load(const void* row, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(row), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Tile>
ALWAYS_INLINE void store(void* row, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(row), "r"(stride_bytes), "i"(Tile) : "memory");
}
template <int Sums, int Left, int Right>
ALWAYS_INLINE void multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Left), "i"(Right));
}

// Calls body(constant i) for each i < Count.
template <int Count, int First = 0, class Body>
ALWAYS_INLINE void unrolled(Body body) {
  if constexpr (First < Count) {
    body(std::integral_constant<int, First>{});
    unrolled<Count, First + 1>(body);
  }
}

// The first registers of both factors, after those of Rows x Columns tiles of sums.
constexpr int kLeft = 4, kRight = 6;

template <int Rows, int Columns>
ALWAYS_INLINE void zero_sums() {
  unrolled<Rows * Columns>([](auto i) { zero<i>(); });
}
// A line of `sums` has Vecs vectors.
template <int Rows, int Columns, int Vecs>
ALWAYS_INLINE void load_sums(const Vec* sums) {
  unrolled<Rows * Columns>([&](auto i) {
    load<i>(sums + i / Columns * kRows * Vecs + i % Columns, Vecs * sizeof(Vec));
  });
}
template <int Rows, int Columns, int Vecs>
ALWAYS_INLINE void store_sums(Vec* sums) {
  unrolled<Rows * Columns>([&](auto i) {
    store<i>(sums + i / Columns * kRows * Vecs + i % Columns, Vecs * sizeof(Vec));
  });
}

// Adds the sum over i < words of left[r][i] * right[i][v] to the sums; a line of `right` has Vecs vectors.
template <int Rows, int Columns, int Vecs>
ALWAYS_INLINE void add_products(const float* left, int64_t left_stride, const Vec* right, int64_t words) {
  const int64_t left_bytes = left_stride * sizeof(float);
  for (int64_t word = 0; word < words; word += kWords) {
    unrolled<Rows>([&](auto r) { load<kLeft + r>(left + r * kRows * left_stride + word, left_bytes); });
    unrolled<Columns>([&](auto v) {
      load<kRight + v>(right + word * Vecs + v, Vecs * sizeof(Vec));
      unrolled<Rows>([&](auto r) { multiply_add<r * Columns + v, kLeft + r, kRight + v>(); });
    });
  }
}

// Calls body(constant number of columns, first) until Vecs vectors are covered, two at a time.
template <int Vecs, class Body>
ALWAYS_INLINE void for_columns(Body body) {
  unrolled<Vecs / 2>([&](auto i) { body(std::integral_constant<int, 2>{}, 2 * i); });
  if constexpr (Vecs % 2) body(std::integral_constant<int, 1>{}, Vecs - 1);
}

// sums[r][v] (+)= sum over i < words of left[r][i] * right[i][v], for Rows tiles of rows and all vectors of the lines.
template <int Rows, int Vecs, bool Add>
ALWAYS_INLINE void multiply(Vec* sums, const float* left, int64_t left_stride, const Vec* right,
                            int64_t words) {
  for_columns<Vecs>([&](auto columns, int v) {
    if constexpr (Add) {
      load_sums<Rows, columns, Vecs>(sums + v);
    } else {
      zero_sums<Rows, columns>();
    }
    add_products<Rows, columns, Vecs>(left, left_stride, right + v, words);
    store_sums<Rows, columns, Vecs>(sums + v);
  });
}

// Calls body(constant number of tiles, first row) until `rows` rows are covered.
template <class Body>
inline void for_tiles(int64_t rows, Body body) {
  int64_t first = 0;
  for (; rows - first > kRows; first += 2 * kRows) body(std::integral_constant<int, 2>{}, first);
  if (first < rows) body(std::integral_constant<int, 1>{}, first);
}

// 32 rows of 8 elements -> 8 columns of one vector: blocks of 8 x 8, one for each 128-bit lane.
template <class SegmentOf>
ALWAYS_INLINE void transpose_segments(SegmentOf segment, float* columns, int64_t stride) {
  __m512i a[8], b[8];
  UNROLL for (int i = 0; i < 8; ++i) {
    a[i] = _mm512_castsi128_si512(segment(i));
    a[i] = _mm512_inserti32x4(a[i], segment(i + 8), 1);
    a[i] = _mm512_inserti32x4(a[i], segment(i + 16), 2);
    a[i] = _mm512_inserti32x4(a[i], segment(i + 24), 3);
  }
  UNROLL for (int i = 0; i < 8; i += 2) {
    b[i] = _mm512_unpacklo_epi16(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi16(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 8; i += 4) {
    UNROLL for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi32(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi32(b[i + j], b[i + j + 2]);
    }
  }
  UNROLL for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(columns + 2 * i * stride, _mm512_unpacklo_epi64(a[i], a[i + 4]));
    _mm512_storeu_si512(columns + (2 * i + 1) * stride, _mm512_unpackhi_epi64(a[i], a[i + 4]));
  }
}

// Up to 32 rows of `dim` elements -> columns[element][row], `stride` words apart; zeros for missing rows.
template <class RowOf>
inline void transpose(int64_t rows, int64_t dim, RowOf row_of, float* columns, int64_t stride) {
  const BFloat16* from[32];
  for (int i = 0; i < 32; ++i) from[i] = i < rows ? row_of(i) : nullptr;
  int64_t d = 0;
  if (rows >= 32) {
    for (; d + 8 <= dim; d += 8) {
      auto segment = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from[i] + d)); };
      transpose_segments(segment, columns + d * stride, stride);
    }
  }
  for (; d < dim; d += 8) {
    const __mmask8 there = dim - d < 8 ? (1 << (dim - d)) - 1 : 0xff;
    auto segment = [&](int i) { return _mm_maskz_loadu_epi16(i < rows ? there : 0, from[i] + d); };
    transpose_segments(segment, columns + d * stride, stride);
  }
}

}  // namespace amx

#endif
