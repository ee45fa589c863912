// exp and exp2 in fp32. Each caller's accuracy and range fix the polynomial:
//
//     exp_fast           scalar, vectorised by the compiler    x ≤ 88            ≤ 2 ulp; 0 below −87
//     exp_nonpositive    AVX-512                               −87 ≤ x ≤ 0       2⁻²³, and the rounding of log2(e)·x
//     exp2_for<float>    AVX-512                               x ≤ 127           ≤ 2 ulp; 0 below −200
//     exp2_for<bf16_t>   AVX-512                               x ≤ 127           3e−6, for results rounded to bf16
//     tanh               AVX-512                               any               ≤ 3 ulp

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace pact_fast {

constexpr float kLog2E = 1.44269504088896341f;

// exp(x) for x ≤ 88. Branch-free, so that compilers vectorise loops around it.
inline float exp_fast(float x) {
  const float bounded = std::max(x, -87.0f);
  const float n = std::nearbyintf(bounded * kLog2E);
  const float r = std::fmaf(n, -1.42860682030941723e-6f, std::fmaf(n, -0.693145751953125f, bounded));  // x − n·ln 2
  float y = 1.9875691500e-4f;
  y = std::fmaf(y, r, 1.3981999507e-3f);
  y = std::fmaf(y, r, 8.3334519073e-3f);
  y = std::fmaf(y, r, 4.1665795894e-2f);
  y = std::fmaf(y, r, 1.6666665459e-1f);
  y = std::fmaf(y, r, 5.0000001201e-1f);
  y = std::fmaf(y * r, r, r) + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : y * power;
}

#ifdef __AVX512F__

constexpr int kRoundToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

// max(x, −87), the domain of exp_nonpositive: exp is denormal below. The cut adds 2e−38 to sums that are at least 1.
// NaN is kept: of two operands, max_ps returns the second if one is NaN.
inline __m512 clamp_exponent(__m512 x) { return _mm512_max_ps(_mm512_set1_ps(-87.0f), x); }

// exp(x) for −87 ≤ x ≤ 0; exactly 1 at 0.
inline __m512 exp_nonpositive(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(kLog2E));
  const __m512 n = _mm512_roundscale_ps(y, kRoundToNearest);
  const __m512 r = _mm512_sub_ps(y, n);
  __m512 power = _mm512_set1_ps(1.3264727313e-3f);  // of 2, minimax on ±1/2
  for (const float c : {9.6715129912e-3f, 5.5507335812e-2f, 2.4022242427e-1f, 6.9314700365e-1f, 1.0f}) {
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(power, n);
}

// 2ˣ for x ≤ 127; exactly 1 at 0, NaN is kept. T: the dtype that the result will be rounded to.
template <typename T>
inline __m512 exp2_for(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, kRoundToNearest), r = _mm512_sub_ps(x, n);
  const auto power = [&](auto first, auto... coefficients) {  // minimax on ±1/2
    __m512 y = _mm512_set1_ps(first);
    ((y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficients))), ...);
    return y;
  };
  if constexpr (sizeof(T) == 2) {
    return _mm512_scalef_ps(power(9.582852993e-3f, 5.590642474e-2f, 2.402409861e-1f, 6.931241934e-1f, 1.0f), n);
  }
  return _mm512_scalef_ps(
      power(1.535336188e-4f, 1.339887440e-3f, 9.618437357e-3f, 5.550332471e-2f, 2.402264791e-1f, 6.931472028e-1f, 1.0f),
      n);
}

// tanh(x); NaN is kept. Near 0 a polynomial, since 1 − 2/(e²ˣ + 1) would lose the digits of small x.
inline __m512 tanh(__m512 x) {
  const __m512 square = _mm512_mul_ps(x, x);
  __m512 odd = _mm512_set1_ps(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) {
    odd = _mm512_fmadd_ps(odd, square, _mm512_set1_ps(c));
  }
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(odd, square), x, x);
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(20.0f), _mm512_max_ps(_mm512_set1_ps(-20.0f), x));
  const __m512 power = exp2_for<float>(_mm512_mul_ps(bounded, _mm512_set1_ps(2.0f * kLog2E)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 large = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(power, one)));
  const __mmask16 is_large = _mm512_cmp_ps_mask(_mm512_abs_ps(x), _mm512_set1_ps(0.625f), _CMP_GT_OQ);
  return _mm512_mask_mov_ps(small, is_large, large);
}

#endif

}  // namespace pact_fast
