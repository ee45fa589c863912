// In-register transposes of blocks of 16 × 16 elements of 32 bits: fp32, or VNNI pairs of bf16.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pact_fast {

// One stage of the transpose: swaps the off-diagonal S × S blocks of every 2S × 2S block.
template <int S>
[[gnu::always_inline]] inline void swap_off_diagonal(__m512i (&rows)[16]) {
  alignas(64) int32_t low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    low[i] = i & S ? 16 + i - S : i;
    high[i] = i & S ? 16 + i : i + S;
  }
  const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i & S) continue;
    const __m512i a = rows[i], b = rows[i + S];
    rows[i] = _mm512_permutex2var_epi32(a, to_low, b);
    rows[i + S] = _mm512_permutex2var_epi32(a, to_high, b);
  }
}

[[gnu::always_inline]] inline void transpose_16x16(__m512i (&rows)[16]) {
  swap_off_diagonal<8>(rows);
  swap_off_diagonal<4>(rows);
  swap_off_diagonal<2>(rows);
  swap_off_diagonal<1>(rows);
}

}  // namespace pact_fast
