// Packing of B for the head's bf16 GEMMs, and the GEMM Z = X·Wᵀ panel by panel, on oneDNN's BRGEMM (common/brgemm.h).
//
// B is packed into panels of kNR = 64 columns in VNNI layout: four registers of sums, the shape that BRGEMM is
// built for. A panel of at most kKC = 2048 rows takes 256 KiB, so that it stays in L2 (1 MiB) while all of A
// streams past it.

#pragma once

#include <algorithm>
#include <cstdint>

#include "common/head_grads.h"
#include "common/parallel.h"
#include "common/tensor.h"

#ifdef __AVX512BF16__  // every CPU with AMX has it, too
#include "common/brgemm.h"
#include "common/isa.h"
#include "common/transpose.h"
#endif

namespace pact_fast::head {

constexpr int64_t kNR = 64;  // columns of a packed panel of B

#ifdef __AVX512BF16__

constexpr int64_t kKC = 2048;  // rows of a packed panel of Wᵀ
constexpr int64_t kMC = 64;    // rows of A per call of BRGEMM

// Prefetches to L2, in steps, the rows that this thread will probably pack next: BRGEMM runs meanwhile, and packing
// would wait for memory.
struct PanelPrefetch {
  const bf16_t* from = nullptr;
  int64_t ld = 0, rows = 0, columns = 0;

  // Step `step` of `steps`.
  void fetch(int64_t step, int64_t steps) const {
    for (int64_t r = rows * step / steps; r < rows * (step + 1) / steps; ++r) {
      for (int64_t k = 0; k < columns; k += 32)
        _mm_prefetch(reinterpret_cast<const char*>(from + r * ld + k), _MM_HINT_T1);
    }
  }
};

// C[m, n] (+)= A[m, k]·B, B one packed panel, k even. BRGEMM compiles code for every shape that it meets and keeps
// it, per thread: blocks of kMC rows, then at most one of 16, 32 or 48 and one below bound the number of shapes.
inline void gemm_panel(int64_t m, int64_t n, int64_t k, const bf16_t* a, int64_t lda, const bf16_t* panel, float* c,
                       int64_t ldc, bool add_c, const PanelPrefetch& prefetch = {}) {
  const int64_t steps = ceil_div(m, kMC);
  for (int64_t i = 0; i < m;) {
    if (i % kMC == 0) prefetch.fetch(i / kMC, steps);
    const int64_t left = m - i, rows = left >= kMC ? kMC : left >= 16 ? left & ~15 : left;
    brgemm(rows, n, k, a + i * lda, lda, panel, kNR, c + i * ldc, ldc, add_c);
    i += rows;
  }
}

// pack B = Wᵀ in VNNI layout: a panel of the `rows` ≤ kNR rows of w [rows, depth] as columns, zero-padded to kNR
// columns and an even depth. The panel has room for `depth` rounded up to 32 rows.
inline void pack_b_transposed_vnni(const bf16_t* w, int64_t ldw, int64_t rows, int64_t depth, bf16_t* panel) {
  for (int64_t n = 0; n < kNR; n += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi16(n + i < rows ? lane_mask32(depth - k) : 0, w + (n + i) * ldw + k);
      }
      transpose_16x16(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (k + 2 * i) * kNR + 2 * n, block[i]);
    }
  }
}

// pack B in VNNI layout: a panel of `columns` ≤ kNR columns of b [rows, ·], zero-padded to kNR columns and `depth` rows
// (even).
inline void pack_b_vnni(const bf16_t* b, int64_t ldb, int64_t rows, int64_t columns, int64_t depth, bf16_t* panel) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t n = 0; n < kNR; n += 16) {
      const __mmask16 mask = lane_mask16(columns - n);
      const bf16_t* source = b + k * ldb + n;
      const __m256i first = _mm256_maskz_loadu_epi16(k < rows ? mask : 0, source);
      const __m256i second = _mm256_maskz_loadu_epi16(k + 1 < rows ? mask : 0, source + ldb);
      _mm512_store_si512(panel + k * kNR + 2 * n, interleave_vnni(first, second));
    }
  }
}

// x [rows, width] as A of a GEMM whose depth is the width: VNNI wants an even depth, for which an odd one is copied and
// zero-padded.
struct EvenDepth {
  int64_t lda;
  AlignedBuffer<bf16_t> copy;
  const bf16_t* a;

  EvenDepth(const bf16_t* x, int64_t rows, int64_t width) : lda(round_up(width, 2)), a(x) {
    if (lda == width) return;
    copy = aligned_buffer<bf16_t>(rows * lda);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(x + i * width, width, &copy[i * lda]);
      copy[i * lda + width] = 0;
    }
    a = copy.get();
  }
};

// Z = X·Wᵀ by panels of kNR columns: x [rows, width], weight [vocab, width].
struct LogitPanels {
  EvenDepth x;
  const bf16_t* weight;
  HeadShape shape;

  LogitPanels(const bf16_t* x, const bf16_t* weight, const HeadShape& shape)
      : x(x, shape.rows, shape.width), weight(weight), shape(shape) {}

  int64_t count() const { return ceil_div(shape.vocab, kNR); }

  // Scratch for a packed panel of Wᵀ.
  bf16_t* take_panel(ScratchArena& arena) const {
    return arena.take<bf16_t>(std::min(round_up(shape.width, 32), kKC) * kNR);
  }

  // Computes panel p in blocks of up to kMC rows. Rows from i on go to z(i), ldz apart; when their sums are complete,
  // done(i, number of rows) is called.
  template <typename Z, typename Done>
  void compute(int64_t p, bf16_t* packed, int64_t ldz, const Z& z, const Done& done) const {
    const int64_t width = shape.width, v = p * kNR, columns = std::min(kNR, shape.vocab - v);
    const int64_t next = v + torch::stable::get_num_threads() * kNR;
    for (int64_t k = 0; k < width; k += kKC) {
      const int64_t depth = std::min(kKC, width - k);
      PanelPrefetch prefetch;
      if (next < shape.vocab) prefetch = {weight + next * width + k, width, std::min(kNR, shape.vocab - next), depth};
      pack_b_transposed_vnni(weight + v * width + k, width, columns, depth, packed);
      for (int64_t i = 0; i < shape.rows; i += kMC) {
        const int64_t m = std::min(kMC, shape.rows - i);
        prefetch.fetch(i / kMC, ceil_div(shape.rows, kMC));
        gemm_panel(m, columns, round_up(depth, 2), x.a + i * x.lda + k, x.lda, packed, z(i), ldz, k > 0);
        if (k + depth == width) done(i, m);
      }
    }
  }
};

inline bool ready() { return brgemm_ready<bf16_t>(); }

#else  // callers ask bf16_gemm_ready first

inline bool ready() { return false; }

#endif

// x [n, D] and weight [V, D], contiguous bf16: the inputs of every op on the bf16 head.
inline HeadShape check_shape(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(ready(), "pact_fast: no bf16 GEMMs on this CPU");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) > 0 && weight.size(0) > 0,
                  "pact_fast: x and weight must be matrices that are not empty");
  check_matrix(x, ScalarType::BFloat16, x.size(0), x.size(1), "x");
  check_matrix(weight, ScalarType::BFloat16, weight.size(0), x.size(1), "weight");
  return {x.size(0), weight.size(0), x.size(1)};
}

}  // namespace pact_fast::head
