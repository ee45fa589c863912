// bf16 elements: conversion to and from fp32, scalar and by 16 lanes, and the VNNI interleave of two rows.

#pragma once

#include <bit>
#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>

#include <array>
#endif

namespace pact_fast {

using bf16_t = uint16_t;  // the bit pattern

inline float to_float(float x) { return x; }
inline float to_float(bf16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

// Round to nearest, ties to even. NaN is kept: NaNs that come from bf16 elements have a zero lower half.
template <>
inline bf16_t from_float<bf16_t>(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<bf16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// x as a tensor of T would hold it.
template <typename T>
inline float round_trip(float x) {
  return to_float(from_float<T>(x));
}

#ifdef __AVX512F__

// 16 elements as fp32, unaligned.
inline __m512 loadu(const float* p) { return _mm512_loadu_ps(p); }
inline void storeu(float* p, __m512 x) { _mm512_storeu_ps(p, x); }

#ifdef __AVX512BF16__

inline __m256i loadu_bits(const bf16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m512 bf16_to_fp32(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

inline __m512 loadu(const bf16_t* p) { return bf16_to_fp32(loadu_bits(p)); }

inline void storeu(bf16_t* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

// VNNI layout: elements of rows k and k + 1 of B alternate, {x0, y0, x1, y1, …}, as dot-product instructions read them.
inline __m512i interleave_vnni(__m256i x, __m256i y) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(x), _mm512_slli_epi32(_mm512_cvtepu16_epi32(y), 16));
}

// The same from one register: {x0 … x15, y0 … y15} → {x0, y0, x1, y1, …}.
inline __m512i interleave_vnni(__m512i xy) {
  alignas(64) static constexpr auto kOrder = [] {
    std::array<int16_t, 32> order{};
    for (int i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
    return order;
  }();
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.data()), xy);
}

#endif
#endif

}  // namespace pact_fast
