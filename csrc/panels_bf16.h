// The panels that the head's block products of bf16 numbers (brgemm.h) read, and the product x·Wᵀ made of them.
//
// B comes in panels of 64 columns: four registers of sums, what the block product is built for. A panel of at most 2048
// rows takes 256 KiB, so that it stays in the second-level cache (1 MiB) while all of A streams past it.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#ifdef __AVX512BF16__  // every CPU with AMX has it, too
#include <immintrin.h>

#include "brgemm.h"
#include "transpose.h"
#endif

#include "work.h"

namespace pact_fast::bf16 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using Bits = uint16_t;  // a bf16 number

constexpr int64_t kPanel = 64;  // columns of B

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

inline bool is(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && columns > 0;
}

// Rows may be further apart than they are long.
inline bool is_rows(const Tensor& t, int64_t rows, int64_t columns) {
  return is(t, ScalarType::Float, rows, columns) && t.stride(1) == 1;
}

inline bool is_whole(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return is(t, type, rows, columns) && t.is_contiguous();
}

#ifdef __AVX512BF16__

using pact_fast::Tiles;
using Buffer = pact_fast::Buffer<Bits>;

constexpr int64_t kDepth = 2048;  // rows of a panel in x·Wᵀ
constexpr int64_t kPiece = 64;    // rows of A worked on at a time

// What this thread is likely to pack next: asked for while the block product is at work, else packing waits for memory.
struct Ahead {
  const Bits* from = nullptr;
  int64_t ld = 0, rows = 0, columns = 0;

  void fetch(int64_t part, int64_t parts) const {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
      for (int64_t k = 0; k < columns; k += 32) _mm_prefetch(reinterpret_cast<const char*>(from + r * ld + k), _MM_HINT_T1);
    }
  }
};

// C[m, n] (+)= A[m, k]·B, B one panel; k even. `brgemm` compiles code for every shape it meets and keeps it, per
// thread: pieces of 64 rows, at most one of 16, 32 or 48 and one below bound the number of shapes.
inline void product(int64_t m, int64_t n, int64_t k, const Bits* a, int64_t lda, const Bits* b, float* c, int64_t ldc,
                    bool add, const Ahead& ahead = {}) {
  const int64_t parts = ceil_div(m, kPiece);
  for (int64_t i = 0; i < m;) {
    if (i % kPiece == 0) ahead.fetch(i / kPiece, parts);
    const int64_t left = m - i, rows = left >= kPiece ? kPiece : left >= 16 ? left & ~15 : left;
    brgemm(rows, n, k, a + i * lda, lda, b, kPanel, c + i * ldc, ldc, add);
    i += rows;
  }
}

// The first `count` of up to 32 lanes.
inline uint32_t lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// A panel whose columns are rows of w: w is [rows, depth], rows ≤ 64; the panel gets zeros up to 64 columns and an even
// depth. Room for a multiple of 32 in depth.
inline void pack_transposed(const Bits* w, int64_t ld, int64_t rows, int64_t depth, Bits* panel) {
  for (int64_t n = 0; n < kPanel; n += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi16(n + i < rows ? lanes(depth - k) : 0, w + (n + i) * ld + k);
      }
      pact_fast::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (k + 2 * i) * kPanel + 2 * n, block[i]);
    }
  }
}

inline __m512i pairs(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// A panel of `columns` ≤ 64 columns of b [rows, ·]; zeros up to 64 columns and up to `depth` (even) rows.
inline void pack(const Bits* b, int64_t ld, int64_t rows, int64_t columns, int64_t depth, Bits* panel) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t n = 0; n < kPanel; n += 16) {
      const auto mask = static_cast<__mmask16>(lanes(columns - n));
      const Bits* source = b + k * ld + n;
      const __m256i first = _mm256_maskz_loadu_epi16(k < rows ? mask : 0, source);
      const __m256i second = _mm256_maskz_loadu_epi16(k + 1 < rows ? mask : 0, source + ld);
      _mm512_store_si512(panel + k * kPanel + 2 * n, pairs(first, second));
    }
  }
}

// x [rows, width] with an even number of columns, as A of a product: a copy, if need be.
struct Even {
  int64_t ld;
  Buffer copy;
  const Bits* x;

  Even(const Bits* given, int64_t rows, int64_t width) : ld(round_up(width, 2)), x(given) {
    if (ld == width) return;
    copy = buffer<Bits>(rows * ld);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(given + i * width, width, &copy[i * ld]);
      copy[i * ld + width] = 0;
    }
    x = copy.get();
  }
};

// The product z = x·Wᵀ, panel by panel: x [rows, width], weight [vocab, width].
struct LogitPanels {
  Even x;
  const Bits* weight;
  int64_t rows, vocab, width;

  int64_t count() const { return ceil_div(vocab, kPanel); }
  int64_t packed() const { return std::min(round_up(width, 32), kDepth) * kPanel; }  // room for a panel of W

  // Panel p in pieces: rows from i on go to place(i), ld apart, and when their sums are complete, done(i, how many).
  template <typename Place, typename Done>
  void panel(int64_t p, Bits* packed, int64_t ld, const Place& place, const Done& done) const {
    const int64_t v = p * kPanel, columns = std::min(kPanel, vocab - v);
    const int64_t next = v + torch::stable::get_num_threads() * kPanel;
    for (int64_t k = 0; k < width; k += kDepth) {
      const int64_t depth = std::min(kDepth, width - k);
      Ahead ahead;
      if (next < vocab) ahead = {weight + next * width + k, width, std::min(kPanel, vocab - next), depth};
      pack_transposed(weight + v * width + k, width, columns, depth, packed);
      for (int64_t i = 0; i < rows; i += kPiece) {
        const int64_t m = std::min(kPiece, rows - i);
        ahead.fetch(i / kPiece, ceil_div(rows, kPiece));
        product(m, columns, round_up(depth, 2), x.x + i * x.ld + k, x.ld, packed, place(i), ld, k > 0);
        if (k + depth == width) done(i, m);
      }
    }
  }
};

inline bool ready() { return brgemm_ready<Bits>(); }

// As share(), on a thread that is left without tiles.
template <typename Work>
void share(int64_t units, int64_t scratch, const Work& work) {
  pact_fast::share<Bits, Tiles>(units, scratch, work);
}

#else  // callers ask `ready` first

inline bool ready() { return false; }

#endif

// x [n, D] and weight [V, D], the factors of every product here.
inline void check_factors(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(ready(), "no bf16 products here");
  STD_TORCH_CHECK(is_whole(x, ScalarType::BFloat16, x.size(0), x.size(1)) &&
                      is_whole(weight, ScalarType::BFloat16, weight.size(0), x.size(1)),
                  "x and weight: contiguous bf16 matrices of one width");
}

}  // namespace pact_fast::bf16
