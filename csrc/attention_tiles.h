// Packing of head rows into BRGEMM operands (common/brgemm.h) for tiles of 64 × 64 scores.
//
// A is row-major. B is row-major in fp32 and in VNNI layout in bf16: 32 bits hold kVnni<T> elements of consecutive
// rows.

#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_mask.h"
#include "common/bf16.h"
#include "common/brgemm.h"
#include "common/exp.h"
#include "common/isa.h"
#include "common/transpose.h"

namespace pact_fast::attention {

constexpr int64_t kScores = kTile * kTile;
constexpr int64_t kUnitElements = 256 * kTile;  // elements per operand of the tiles that a unit owns: they stay in L2
constexpr int64_t kMaxUnitTiles = 4;
constexpr float kMaskedScore = -1e30f;  // below any score, and finite when scaled

template <typename T>
constexpr int64_t kVnni = 4 / sizeof(T);  // elements in 32 bits

// Tiles that a unit of work owns.
inline int64_t unit_tiles(int64_t head_dim) {
  return std::clamp<int64_t>(kUnitElements / (kTile * head_dim), 1, kMaxUnitTiles);
}

// Stores x and y, 16 elements of rows k and k + 1, into an A operand of leading dimension kTile.
template <typename T>
void store_a(T* a, __m512 x, __m512 y) {
  storeu(a, x);
  storeu(a + kTile, y);
}

// The same into a B operand [·, kTile], at row k (even) and a column.
inline void store_b(float* b, int64_t k, int64_t column, __m512 x, __m512 y) { store_a(b + k * kTile + column, x, y); }

// pack B from `count` ≤ kTile rows, zero-padded to kTile rows.
inline void pack_b(const float* rows, int64_t ld, int64_t count, int64_t width, float* b) {
  for (int64_t k = 0; k < kTile; ++k) {
    for (int64_t d = 0; d < width; d += 16) {
      storeu(b + k * width + d, k < count ? loadu(rows + k * ld + d) : _mm512_setzero_ps());
    }
  }
}

#ifdef __AVX512BF16__

inline void store_b(bf16_t* b, int64_t k, int64_t column, __m512 x, __m512 y) {
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
  _mm512_storeu_si512(b + k * kTile + 2 * column, interleave_vnni(both));
}

// pack B in VNNI layout.
inline void pack_b(const bf16_t* rows, int64_t ld, int64_t count, int64_t width, bf16_t* b) {
  for (int64_t k = 0; k < kTile; k += 2) {
    for (int64_t d = 0; d < width; d += 16) {
      const bf16_t* p = rows + k * ld + d;
      const __m256i zero = _mm256_setzero_si256();
      const __m256i x = k < count ? loadu_bits(p) : zero, y = k + 1 < count ? loadu_bits(p + ld) : zero;
      _mm512_storeu_si512(b + k * width + 2 * d, interleave_vnni(_mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1)));
    }
  }
}

#endif

// Transposes units of 32 bits: out[u][r] ← unit u of row r, for `rows` rows (a multiple of 16), zeros from row
// `count` on.
template <typename T>
void transpose_units(const T* in, int64_t ld, int64_t count, int64_t rows, int64_t width, T* out, int64_t ld_out) {
  const int64_t units = width / kVnni<T>;
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t u = 0; u < units; u += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __mmask16 mask = r + i < count ? lane_mask16(units - u) : 0;
        block[i] = _mm512_maskz_loadu_epi32(mask, in + (r + i) * ld + u * kVnni<T>);
      }
      transpose_16x16(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (u + i < units) _mm512_storeu_si512(out + (u + i) * ld_out + r * kVnni<T>, block[i]);
      }
    }
  }
}

// pack B = rowsᵀ [width, kTile] from rows of a head: the depth of the GEMM is the head dimension.
template <typename T>
void pack_b_transposed(const T* rows, int64_t ld, int64_t count, int64_t width, T* b) {
  transpose_units(rows, ld, count, kTile, width, b, kTile * kVnni<T>);
}

// A = rowsᵀ [width, lda] from rows that are packed as B: the depth of the GEMM is the rows.
template <typename T>
void transpose_packed_b(const T* b, int64_t width, T* a, int64_t lda) {
  transpose_units(b, width * kVnni<T>, kTile, kTile / kVnni<T>, width * kVnni<T>, a, lda);
}

// pack A from rows of a head: the depth of the GEMM is the head dimension.
template <typename T>
void pack_a(const T* rows, int64_t ld, int64_t count, int64_t width, T* a) {
  for (int64_t k = 0; k < kTile; ++k) {
    if (k < count) {
      std::copy_n(rows + k * ld, width, a + k * width);
    } else {
      std::fill_n(a + k * width, width, T{});
    }
  }
}

// rows [count, width] ← factor[r]·transposed[d][r], transposed [width, kTile].
template <typename T>
void untranspose_scaled(const float* transposed, const float* factor, int64_t count, int64_t width, T* rows,
                        int64_t ld) {
  for (int64_t r = 0; r < count; r += 16) {
    const __m512 factors = loadu(factor + r);
    for (int64_t d = 0; d < width; d += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_castps_si512(_mm512_mul_ps(factors, loadu(transposed + (d + i) * kTile + r)));
      }
      transpose_16x16(block);
      for (int i = 0; i < std::min<int64_t>(16, count - r); ++i) {
        storeu(rows + (r + i) * ld + d, _mm512_castsi512_ps(block[i]));
      }
    }
  }
}

// Prefetches rows of a head to L2 while the thread computes: the hardware prefetcher does not follow their stride.
template <typename T>
inline void prefetch_rows(const T* rows, int64_t ld, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += 64 / sizeof(T)) {
      _mm_prefetch(reinterpret_cast<const char*>(rows + i * ld + d), _MM_HINT_T1);
    }
  }
}

// Scores q·k of a tile as soft-capped scores divided by the scale, (softcap / scale)·tanh(scale·score / softcap).
inline void cap_scores(float* scores, float scale, float softcap) {
  const __m512 inner = _mm512_set1_ps(scale / softcap), outer = _mm512_set1_ps(softcap / scale);
  for (int64_t i = 0; i < kScores; i += 16) {
    storeu(scores + i, _mm512_mul_ps(outer, tanh(_mm512_mul_ps(inner, loadu(scores + i)))));
  }
}

}  // namespace pact_fast::attention
