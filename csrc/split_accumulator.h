// SplitAccumulator: a matrix of sums in 24 bits, a bf16 element and an int8 of its rounding error.
//
// `hi` is the sum rounded to bf16 and `lo` the error in 1/256 of its last place. Together they are off by 2⁻¹⁶ at
// most, little beside the 2⁻⁸ of a bf16 result; they take 3 bytes instead of the 4 of fp32, and `hi` by itself is
// the result: no second matrix and no pass that casts it.
//
// Floats of one sign are ordered like their bit patterns, so rounding is integer arithmetic, across powers of 2 as
// well. NaNs here come from bf16 elements or from the processor: their low 16 bits are 0 and rounding carries
// nothing over.

#pragma once

#include <cstdint>

#include "common/bf16.h"
#include "common/isa.h"

namespace pact_fast::head {

struct SplitAccumulator {
  bf16_t* hi;
  int8_t* lo;
  int64_t ld;
  bool add;  // adds to the present contents instead of replacing them
};

#ifdef __AVX512BF16__

// 16 floats: the upper 24 bits of `rounded24` hold hi and lo, the upper 16 bits of `rounded16` hold hi.
struct SplitBits {
  __m512i rounded24, rounded16;
};

inline SplitBits split(__m512 sums) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(sums), _mm512_set1_epi32(0x80));
  return {bits, _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000))};
}

inline __m512 join(__m256i hi, __m128i lo) {
  const __m512i rounded16 = _mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16);
  return _mm512_castsi512_ps(_mm512_add_epi32(rounded16, _mm512_slli_epi32(_mm512_cvtepi8_epi32(lo), 8)));
}

// hi, lo [n] (+)= sums [n], n ≤ 16.
inline void accumulate_tail(const float* sums, int64_t n, bf16_t* hi, int8_t* lo, bool add) {
  const __mmask16 mask = lane_mask16(n);
  __m512 values = _mm512_maskz_loadu_ps(mask, sums);
  if (add) values = _mm512_add_ps(values, join(_mm256_maskz_loadu_epi16(mask, hi), _mm_maskz_loadu_epi8(mask, lo)));
  const SplitBits parts = split(values);
  _mm256_mask_storeu_epi16(hi, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(parts.rounded16, 16)));
  _mm_mask_storeu_epi8(lo, mask, _mm512_cvtepi32_epi8(_mm512_srli_epi32(parts.rounded24, 8)));
}

// The same for 64 elements, without masks; sums are aligned.
template <bool add>
void accumulate_64(const float* sums, bf16_t* hi, int8_t* lo) {
#pragma GCC unroll 4
  for (int i = 0; i < 64; i += 16) {
    __m512 values = _mm512_load_ps(sums + i);
    if (add) {
      const __m256i before = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(hi + i));
      values = _mm512_add_ps(values, join(before, _mm_loadu_si128(reinterpret_cast<const __m128i*>(lo + i))));
    }
    const SplitBits parts = split(values);
    const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32(parts.rounded16, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(hi + i), upper);
    const __m128i lower = _mm512_cvtepi32_epi8(_mm512_srli_epi32(parts.rounded24, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lo + i), lower);
  }
}

// One row of n sums.
inline void accumulate_row(const float* sums, int64_t n, bf16_t* hi, int8_t* lo, bool add) {
  int64_t j = 0;
  for (; j + 64 <= n; j += 64) (add ? accumulate_64<true> : accumulate_64<false>)(sums + j, hi + j, lo + j);
  for (; j < n; j += 16) accumulate_tail(sums + j, n - j, hi + j, lo + j, add);
}

#endif

}  // namespace pact_fast::head
