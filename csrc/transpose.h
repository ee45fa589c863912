// Blocks of 16×16 numbers of 32 bits (fp32, or pairs of bf16), turned over in registers.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pact_fast {

// One step of the transposition: swaps the off-diagonal blocks of S×S in every block of 2S×2S.
template <int S>
[[gnu::always_inline]] inline void swap_blocks(__m512i (&rows)[16]) {
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

[[gnu::always_inline]] inline void transpose(__m512i (&rows)[16]) {
  swap_blocks<8>(rows);
  swap_blocks<4>(rows);
  swap_blocks<2>(rows);
  swap_blocks<1>(rows);
}

}  // namespace pact_fast
