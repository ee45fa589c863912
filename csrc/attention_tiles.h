// Rows of heads as operands of block products on tiles of 64 by 64 (brgemm.h), and numbers of fp32 and bf16 by sixteen.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "attention_views.h"
#include "brgemm.h"
#include "transpose.h"

namespace pact_fast::attention {

constexpr int64_t kScores = kTile * kTile;
constexpr int64_t kOwned = 256 * kTile;  // numbers in an operand of the tiles that a unit owns: they stay in the cache
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNoScore = -1e30f;  // less than any, and finite when scaled

template <typename T>
constexpr int64_t kPair = 4 / sizeof(T);  // numbers in 32 bits

// How many tiles a unit of work owns.
inline int64_t owned(int64_t width) { return std::clamp<int64_t>(kOwned / (kTile * width), 1, 4); }

inline __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }

inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }

// 16 numbers of row k and of row k + 1 of an operand A, whose rows have kTile numbers.
inline void store_rows(float* a, __m512 x, __m512 y) {
  store(a, x);
  store(a + kTile, y);
}

// The same of an operand B.
inline void store_pairs(float* b, int64_t k, int64_t column, __m512 x, __m512 y) { store_rows(b + k * kTile + column, x, y); }

// B from `count` ≤ kTile rows; zeros up to kTile rows.
inline void pair(const float* rows, int64_t ld, int64_t count, int64_t width, float* b) {
  for (int64_t k = 0; k < kTile; ++k) {
    for (int64_t d = 0; d < width; d += 16) store(b + k * width + d, k < count ? load(rows + k * ld + d) : _mm512_setzero_ps());
  }
}

#ifdef __AVX512BF16__
inline __m256i half(const Bits* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m512 load(const Bits* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half(p)), 16)); }

inline void store(Bits* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

inline void store_rows(Bits* a, __m512 x, __m512 y) {
  store(a, x);
  store(a + kTile, y);
}

// y's numbers behind x's → x's and y's in turn.
inline __m512i interleaved(__m512i both) {
  alignas(64) static constexpr auto kTurns = [] {
    std::array<int16_t, 32> at{};
    for (int i = 0; i < 32; ++i) at[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
    return at;
  }();
  return _mm512_permutexvar_epi16(_mm512_load_si512(kTurns.data()), both);
}

inline void store_pairs(Bits* b, int64_t k, int64_t column, __m512 x, __m512 y) {
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
  _mm512_storeu_si512(b + k * kTile + 2 * column, interleaved(both));
}

inline void pair(const Bits* rows, int64_t ld, int64_t count, int64_t width, Bits* b) {
  for (int64_t k = 0; k < kTile; k += 2) {
    for (int64_t d = 0; d < width; d += 16) {
      const Bits* p = rows + k * ld + d;
      const __m256i zero = _mm256_setzero_si256(), x = k < count ? half(p) : zero, y = k + 1 < count ? half(p + ld) : zero;
      _mm512_storeu_si512(b + k * width + 2 * d, interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1)));
    }
  }
}
#endif

// out[u][r] ← the 32 bits at place u of row r; `rows` rows (a multiple of 16), zeros from row `count` on.
template <typename T>
void turn(const T* in, int64_t ld, int64_t count, int64_t rows, int64_t width, T* out, int64_t out_ld) {
  const int64_t units = width / kPair<T>;
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t u = 0; u < units; u += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi32(r + i < count ? lanes(units - u) : 0, in + (r + i) * ld + u * kPair<T>);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (u + i < units) _mm512_storeu_si512(out + (u + i) * out_ld + r * kPair<T>, block[i]);
      }
    }
  }
}

// Rows of a head as B of a product whose depth is the width of the head: [width, kTile].
template <typename T>
void pack_turned(const T* rows, int64_t ld, int64_t count, int64_t width, T* b) {
  turn(rows, ld, count, kTile, width, b, kTile * kPair<T>);
}

// `paired`, rows of a head as B, as A of a product whose depth are the rows: [width, ld].
template <typename T>
void turn_paired(const T* paired, int64_t width, T* a, int64_t ld) {
  turn(paired, width * kPair<T>, kTile, kTile / kPair<T>, width * kPair<T>, a, ld);
}

// Rows of a head as A of a product whose depth is the width of the head.
template <typename T>
void pack_rows(const T* rows, int64_t ld, int64_t count, int64_t width, T* a) {
  for (int64_t k = 0; k < kTile; ++k) {
    if (k < count) {
      std::copy_n(rows + k * ld, width, a + k * width);
    } else {
      std::fill_n(a + k * width, width, T{});
    }
  }
}

// Rows of a head [count, width] ← factor[r]·turned[d][r].
template <typename T>
void unturn(const float* turned, const float* factor, int64_t count, int64_t width, T* rows, int64_t ld) {
  for (int64_t r = 0; r < count; r += 16) {
    const __m512 factors = load(factor + r);
    for (int64_t d = 0; d < width; d += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_castps_si512(_mm512_mul_ps(factors, load(turned + (d + i) * kTile + r)));
      }
      transpose(block);
      for (int i = 0; i < std::min<int64_t>(16, count - r); ++i) store(rows + (r + i) * ld + d, _mm512_castsi512_ps(block[i]));
    }
  }
}

// 2ˣ for x ≤ 127, exactly 1 at 0, 0 for x < −200; NaN stays. Within 2 ulp where T is fp32; within 3e−6, a thousandth of what
// it will be rounded by, where it is bf16.
template <typename T>
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  const auto power = [&](auto first, auto... coefficients) {  // minimax on ±1/2
    __m512 y = _mm512_set1_ps(first);
    ((y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficients))), ...);
    return y;
  };
  if constexpr (sizeof(T) == 2) {
    return _mm512_scalef_ps(power(9.582852993e-3f, 5.590642474e-2f, 2.402409861e-1f, 6.931241934e-1f, 1.0f), n);
  }
  return _mm512_scalef_ps(power(1.535336188e-4f, 1.339887440e-3f, 9.618437357e-3f, 5.550332471e-2f, 2.402264791e-1f,
                                6.931472028e-1f, 1.0f), n);
}

// Asks for rows of a head, while there is something else to do: they lie apart, which processors do not foresee.
template <typename T>
inline void fetch(const T* rows, int64_t ld, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += 64 / sizeof(T)) {
      _mm_prefetch(reinterpret_cast<const char*>(rows + i * ld + d), _MM_HINT_T1);
    }
  }
}

// Pieces of one thread's memory.
class Pieces {
 public:
  explicit Pieces(char* at) : at_(at) {}

  template <typename U>
  U* take(int64_t count) {
    char* piece = at_;
    at_ += round_up(count * sizeof(U), 64);
    return reinterpret_cast<U*>(piece);
  }

 private:
  char* at_;
};

}  // namespace pact_fast::attention
