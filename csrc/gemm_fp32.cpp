// The three GEMMs of the fused head in fp32, on CPUs with AVX-512.
//
//     Z[n, V] = X·Wᵀ        dX[n, D] = dZ·W        dW[V, D] += dZᵀ·X
//
// A BLAS packs A and B again for every GEMM, and MKL's leaves part of AMD's cores idle on these shapes (times:
// docs/kernels.md). Here a few rows meet a large matrix, and only the large one has to be packed:
//
//  * pack B: panels of kNR = 64 columns, four registers wide. A panel of kKC rows takes 256 KiB, stays in L2 (1
//    MiB) and all of A streams past it. The micro-kernel computes kMR × kNR = 6 × 64 elements of C in 24 registers.
//  * dX and dW: blocks of 768 columns of dZ (common/head_grads.h).

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/head_grads.h"
#include "common/parallel.h"
#include "common/tensor.h"

#ifdef __AVX512F__
#include "common/isa.h"
#include "common/transpose.h"
#endif

namespace pact_fast {
namespace {

constexpr int64_t kMaxRows = 1024;  // rows of dZ per pass over W: the depth of dW

#ifdef __AVX512F__

constexpr int64_t kNR = 64;          // columns of a packed panel of B
constexpr int64_t kMR = 6;           // rows of A per micro-kernel
constexpr int64_t kKC = 1024;        // rows of a packed panel of Wᵀ
constexpr int64_t kPartialSum = 64;  // terms of one running sum

// Element (i, k) is a[i·lda + k], or a[k·lda + i] if transposed.
struct MatrixA {
  const float* a;
  int64_t lda;
  bool transposed;

  MatrixA from_row(int64_t row) const { return {a + row * (transposed ? 1 : lda), lda, transposed}; }
};

struct MatrixC {
  float* c;
  int64_t ldc, columns;  // at most kNR
  bool add_c;            // C += A·B, not C = A·B
};

// C[rows, kNR] (+)= A·B, rows ≤ kMR. Partial sums of kPartialSum terms are added up apart: one running sum of
// thousands of terms would lose digits to rounding.
template <int rows, bool transposed>
void micro_kernel(int64_t depth, const float* a, int64_t lda, const float* panel, const MatrixC& out, int64_t row) {
  __m512 total[rows][4] = {};
  for (int64_t begin = 0; begin < depth; begin += kPartialSum) {
    const int64_t end = std::min(depth, begin + kPartialSum);
    __m512 sums[rows][4] = {};
    for (int64_t k = begin; k < end; ++k) {
      __m512 b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) b[j] = _mm512_load_ps(panel + k * kNR + 16 * j);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const __m512 factor = _mm512_set1_ps(transposed ? a[k * lda + i] : a[i * lda + k]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_fmadd_ps(factor, b[j], sums[i][j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) total[i][j] = _mm512_add_ps(total[i][j], sums[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* c = out.c + (row + i) * out.ldc + 16 * j;
      const __mmask16 mask = lane_mask16(out.columns - 16 * j);
      const __m512 before = out.add_c ? _mm512_maskz_loadu_ps(mask, c) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(c, mask, _mm512_add_ps(before, total[i][j]));
    }
  }
}

template <int rows>
void micro_kernel(int64_t depth, const MatrixA& a, const float* panel, const MatrixC& out, int64_t row) {
  a.transposed ? micro_kernel<rows, true>(depth, a.a, a.lda, panel, out, row)
               : micro_kernel<rows, false>(depth, a.a, a.lda, panel, out, row);
}

// C[rows, columns] (+)= A[rows, depth]·B, B one packed panel.
void gemm_panel(int64_t rows, int64_t depth, const MatrixA& a, const float* panel, const MatrixC& out) {
  static constexpr decltype(&micro_kernel<1>) kKernels[kMR] = {micro_kernel<1>, micro_kernel<2>, micro_kernel<3>,
                                                               micro_kernel<4>, micro_kernel<5>, micro_kernel<6>};
  for (int64_t i = 0; i < rows; i += kMR) kKernels[std::min(kMR, rows - i) - 1](depth, a.from_row(i), panel, out, i);
}

// pack B = Wᵀ: a panel of the `rows` ≤ kNR rows of w [rows, depth] as columns, zero-padded to kNR columns. The
// panel has room for `depth` rounded up to 16 rows.
void pack_b_transposed(const float* w, int64_t ldw, int64_t rows, int64_t depth, float* panel) {
  for (int64_t n = 0; n < kNR; n += 16) {
    for (int64_t k = 0; k < depth; k += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi32(n + i < rows ? lane_mask16(depth - k) : 0, w + (n + i) * ldw + k);
      }
      transpose_16x16(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (k + i) * kNR + n, block[i]);
    }
  }
}

// pack B: the first `columns` ≤ `ld_packed` columns of b [rows, ·], zero-padded to `ld_packed` columns.
void pack_b(const float* b, int64_t ldb, int64_t rows, int64_t columns, int64_t ld_packed, float* packed) {
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t n = 0; n < ld_packed; n += 16) {
      _mm512_store_ps(packed + k * ld_packed + n, _mm512_maskz_loadu_ps(lane_mask16(columns - n), b + k * ldb + n));
    }
  }
}

bool ready() { return true; }

void logits(const float* x, const float* weight, float* z, int64_t ldz, const HeadShape& shape) {
  const int64_t rows = shape.rows, vocab = shape.vocab, width = shape.width;
  const auto layout = [&](ScratchArena& arena) {
    return arena.take<float>(/* panel of Wᵀ */ std::min(round_up(width, 16), kKC) * kNR);
  };
  parallel_for_dynamic(ceil_div(vocab, kNR), layout, [&](int64_t unit, float* panel) {
    const int64_t v = unit * kNR, columns = std::min(kNR, vocab - v);
    for (int64_t k = 0; k < width; k += kKC) {
      const int64_t depth = std::min(kKC, width - k);
      pack_b_transposed(weight + v * width + k, width, columns, depth, panel);
      gemm_panel(rows, depth, {x + k, width, false}, panel, {z + v, ldz, columns, k > 0});
    }
  });
}

// A kernel of run_head_grads for up to kMaxRows rows of dZ. dx and d_weight may be null.
struct Fp32Grads {
  static constexpr int64_t kNR = pact_fast::kNR, kKC = 768, kMC = 48, kRowAlign = kMR;
  using Guard = NoGuard;

  struct Scratch {
    float *w_panel, *dz_columns;
  };

  const float* dz;
  int64_t lddz;
  const float *x, *weight;
  float *dx, *d_weight;
  bool add_dw;  // dW += dZᵀ·X, not dW = dZᵀ·X
  HeadShape shape;
  AlignedBuffer<float> x_panels = aligned_buffer<float>(wants_dw() ? pack_units() * kNR * shape.rows : 0);

  bool wants_dx() const { return dx != nullptr; }
  bool wants_dw() const { return d_weight != nullptr; }

  Scratch layout(ScratchArena& arena) const {
    float* piece = arena.take<float>(std::max(/* w_panel */ kKC * kNR, /* dz_columns */ shape.rows * kMC));
    return {piece, piece};  // a unit uses one of them
  }

  int64_t pack_units() const { return wants_dw() ? ceil_div(shape.width, kNR) : 0; }

  // pack B = X of dW.
  void pack(int64_t p) {
    pack_b(x + p * kNR, shape.width, shape.rows, std::min(kNR, shape.width - p * kNR), kNR, x_panel(p * kNR));
  }

  float* x_panel(int64_t column) { return &x_panels[column * shape.rows]; }

  int64_t next_units() const { return 0; }  // dZ is read as it is
  void next(int64_t, int64_t) {}

  void input_grad(int64_t v, int64_t row, int64_t rows, int64_t column, int64_t, const Scratch& scratch) {
    const int64_t width = shape.width, depth = std::min(kKC, shape.vocab - v), columns = std::min(kNR, width - column);
    pack_b(weight + v * width + column, width, depth, columns, kNR, scratch.w_panel);
    gemm_panel(rows, depth, {dz + row * lddz + v, lddz, false}, scratch.w_panel,
               {dx + row * width + column, width, columns, v > 0});
  }

  void weight_grad(int64_t v, int64_t row, int64_t rows, const Scratch& scratch) {
    const int64_t width = shape.width;
    pack_b(dz + v + row, lddz, shape.rows, rows, kMC, scratch.dz_columns);
    for (int64_t column = 0; column < width; column += kNR) {
      gemm_panel(rows, shape.rows, {scratch.dz_columns, kMC, true}, x_panel(column),
                 {d_weight + (v + row) * width + column, width, std::min(kNR, width - column), add_dw});
    }
  }
};

void grads(const float* dz, int64_t lddz, const float* x, const float* weight, float* dx, float* d_weight, bool add_dw,
           const HeadShape& shape) {
  Fp32Grads kernel{dz, lddz, x, weight, dx, d_weight, add_dw, shape};
  run_head_grads(kernel);
}

#else  // callers ask fp32_gemm_ready first

bool ready() { return false; }
void logits(const float*, const float*, float*, int64_t, const HeadShape&) {}
void grads(const float*, int64_t, const float*, const float*, float*, float*, bool, const HeadShape&) {}

#endif

HeadShape check_shape(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(ready(), "pact_fast: no fp32 GEMMs on this CPU");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) > 0 && weight.size(0) > 0,
                  "pact_fast: x and weight must be matrices that are not empty");
  check_matrix(x, ScalarType::Float, x.size(0), x.size(1), "x");
  check_matrix(weight, ScalarType::Float, weight.size(0), x.size(1), "weight");
  return {x.size(0), weight.size(0), x.size(1)};
}

bool fp32_gemm_ready() { return ready(); }

// z ← x·Wᵀ: x [n, D], weight [V, D] contiguous; z [n, V] with contiguous rows; all fp32.
void fp32_logits(const Tensor x, const Tensor weight, Tensor z) {
  const HeadShape shape = check_shape(x, weight);
  check_rows(z, ScalarType::Float, shape.rows, shape.vocab, "z");
  logits(data_ptr<float>(x), data_ptr<float>(weight), data_ptr<float>(z), z.stride(0), shape);
}

// dx ← dz·W; d_weight ← dzᵀ·x or, if `add`, d_weight += dzᵀ·x. dz [n, V] with contiguous rows; dx [n, D] and
// d_weight [V, D] contiguous, each may be missing; all fp32.
void fp32_grads(const Tensor dz, const Tensor x, const Tensor weight, std::optional<Tensor> dx,
                std::optional<Tensor> d_weight, bool add) {
  const HeadShape shape = check_shape(x, weight);
  const auto [rows, vocab, width] = shape;
  check_rows(dz, ScalarType::Float, rows, vocab, "dz");
  if (dx) check_matrix(*dx, ScalarType::Float, rows, width, "dx");
  if (d_weight) check_matrix(*d_weight, ScalarType::Float, vocab, width, "d_weight");
  for (int64_t i = 0; i < rows; i += kMaxRows) {
    grads(data_ptr<float>(dz) + i * dz.stride(0), dz.stride(0), data_ptr<float>(x) + i * width, data_ptr<float>(weight),
          dx ? data_ptr<float>(*dx) + i * width : nullptr, data_ptr<float>(d_weight), add || i > 0,
          {std::min(kMaxRows, rows - i), vocab, width});
  }
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("fp32_gemm_ready() -> bool");
  m.def("fp32_logits(Tensor x, Tensor weight, Tensor(a!) z) -> ()");
  m.def("fp32_grads(Tensor dz, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? d_weight, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("fp32_gemm_ready", TORCH_BOX(&pact_fast::fp32_gemm_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("fp32_logits", TORCH_BOX(&pact_fast::fp32_logits));
  m.impl("fp32_grads", TORCH_BOX(&pact_fast::fp32_grads));
}
