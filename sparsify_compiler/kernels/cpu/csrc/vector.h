// The arithmetic of the kernels: vectors of floats as wide as the machine's, exp2 on them, the 16-bit float types, and
// two kinds of products: fp32, and bf16 pairs where the CPU has them.
//
// It uses the vector extensions of GCC and Clang, so it compiles for any CPU, and x86 intrinsics only where there is
// no other spelling. A "word" is the four bytes of each operand that one multiply-add reads: one fp32, or two
// neighbouring bf16.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__x86_64__)
constexpr int kLanes = 4, kRegisters = 16;
#else
constexpr int kLanes = 4, kRegisters = 32;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using UintVec = uint32_t __attribute__((vector_size(4 * kLanes)));

inline Vec splat(float x) { return x - Vec{}; }

// The larger of the two; `b` where `a` is NaN.
inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

// `x` clamped to +-limit, a number or lane by lane; NaN stays.
template <class X>
inline X within(X x, X limit) {
  const X high = x > limit ? limit : x;
  return high < -limit ? -limit : high;
}

// 2^f for f in [0, 1]: minimax, relative error 8.3e-8, exact at 0.
inline Vec exp2_of_fraction(Vec f) {
  Vec p = splat(0.00186713007004502f);
  p = p * f + 0.009017030321972722f;
  p = p * f + 0.055799913104201654f;
  p = p * f + 0.24016445015490245f;
  p = p * f + 0.693151311804626f;
  return p * f + 1.0f;
}

// 2^x for x <= 0 (to about one unit in the last place), 0 for -inf, x itself for +inf and NaN.
inline Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
  const Vec fraction = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (Vec)_mm512_scalef_ps((__m512)exp2_of_fraction(fraction), (__m512)x);
#else
  constexpr float kSmallest = -126.0f, kRounder = 0x1.8p23f;  // adding the rounder leaves an integer
  const Vec clamped = x < kSmallest ? splat(kSmallest) : x;
  const Vec rounded = (clamped - 0.5f) + kRounder;
  const Vec power = exp2_of_fraction(clamped - (rounded - kRounder));
  const Vec scaled = (Vec)((UintVec)power + ((UintVec)rounded << 23));
  return x <= 1.0f ? (x < kSmallest ? Vec{} : scaled) : x;
#endif
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Without branches, so that compilers vectorise a loop of it.
inline float to_float(Half x) {
  constexpr uint32_t kRebias = 112u << 23;  // from an exponent bias of 15 to one of 127
  const uint32_t shifted = uint32_t(x.bits & 0x7fff) << 13;
  const uint32_t exponent = shifted & (0x1fu << 23);
  const uint32_t special = exponent == (0x1fu << 23) ? kRebias : 0;
  const uint32_t subnormal = exponent == 0 ? 1u << 23 : 0;
  const float magnitude = bit_cast<float>(shifted + kRebias + special + subnormal) -
                          (subnormal ? bit_cast<float>(kRebias + (1u << 23)) : 0.0f);
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | uint32_t(x.bits & 0x8000) << 16);
}

template <class T>
T from_float(float x);

template <>
inline float from_float(float x) {
  return x;
}

// The upper half of the bits, rounded to nearest, ties to even.
template <>
inline BFloat16 from_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return {uint16_t(x == x ? rounded : 0x7fc0)};
}

template <>
inline Half from_float(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 143u << 23) {  // 2^16 and above, inf, NaN
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude < 113u << 23) {  // subnormal: adding 1/2 aligns its last bit with that of the sum
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  return {uint16_t(sign | half)};
}

// Arithmetic in fp32, for every type in memory.
struct Fp32 {
  using Packed = float;  // an element of a word
  static constexpr int kPerWord = 1;

  static Vec multiply_add(Vec sum, float left, Vec right) { return sum + left * right; }

  // One row of `dim` elements -> `dim` words.
  template <class T>
  static void pack_row(const T* row, int64_t dim, float* words) {
    for (int64_t d = 0; d < dim; ++d) words[d] = to_float(row[d]);
  }

  // The row above and the row below -> `dim` words. A word holds one element: there is no row below.
  template <class T>
  static void pack_rows(const T* above, const T*, int64_t dim, float* words) {
    pack_row(above, dim, words);
  }

  static Vec join(const Vec* rows) { return rows[0]; }
};

#if defined(__AVX512BF16__)
// Products of bf16 pairs, summed in fp32.
struct Bf16Pairs {
  using Packed = BFloat16;
  static constexpr int kPerWord = 2;

  static Vec multiply_add(Vec sum, float left, Vec right) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_ps(left), (__m512bh)(__m512)right);
  }

  static void pack_row(const BFloat16* row, int64_t dim, float* words) {
    std::memcpy(words, row, dim * sizeof(BFloat16));
    if (dim % 2) reinterpret_cast<BFloat16*>(words)[dim] = {0};
  }

  // Element d of both rows side by side in word d; zeros if there is no row below.
  static void pack_rows(const BFloat16* above, const BFloat16* below, int64_t dim, float* words) {
    auto* pairs = reinterpret_cast<uint32_t*>(words);
    if (below) {
      for (int64_t d = 0; d < dim; ++d) pairs[d] = above[d].bits | uint32_t(below[d].bits) << 16;
    } else {
      for (int64_t d = 0; d < dim; ++d) pairs[d] = above[d].bits;
    }
  }

  // The two rows rounded to bf16, those of a lane side by side.
  static Vec join(const Vec* rows) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)rows[1], (__m512)rows[0]);
    const UintVec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const UintVec sides = lane | (lane + 16) << 16;
    return (Vec)_mm512_permutexvar_epi16((__m512i)sides, halves);
  }

  // Both vectors rounded to bf16, neighbouring lanes side by side.
  static Vec pair(Vec low, Vec high) { return (Vec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low); }
};
#endif
