// The sums of the lanes of 16 registers at once: a dot product each, without 16 reductions across lanes.

#pragma once

#include <immintrin.h>

namespace pact_fast {

// {Σ v[0], …, Σ v[15]}
[[gnu::always_inline]] inline __m512 sum_lanes(const __m512 (&v)[16]) {
  __m512 quads[4];  // lane 4i + j: a quarter of the sum of v[4q + j]
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * q], v[4 * q + 1]),
                                    _mm512_unpackhi_ps(v[4 * q], v[4 * q + 1])),
                 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[4 * q + 2], v[4 * q + 3]),
                                    _mm512_unpackhi_ps(v[4 * q + 2], v[4 * q + 3]));
    const __m512d low = _mm512_castps_pd(ab), high = _mm512_castps_pd(cd);
    quads[q] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  const __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(quads[0], quads[1], 0x44),
                                   _mm512_shuffle_f32x4(quads[0], quads[1], 0xee)),
               high = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2], quads[3], 0x44),
                                    _mm512_shuffle_f32x4(quads[2], quads[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

}  // namespace pact_fast
