// The two GEMMs of the head's backward pass in bf16, from a chunk of dZ [n, V] that is rounded to bf16 on the way:
//
//     dX[n, D] = bf16(dZ)·W        dW[V, D] += bf16(dZ)ᵀ·X        (dW: 24 bits, see split_accumulator.h)
//
// A block of 768 columns of dZ is rounded once and written twice: row-major, as A of dX, and transposed, as A of
// dW. The next block is rounded while this one is worked on. With up to 1024 rows that is 4 × 1.5 MiB for all
// threads together; the packed X has its own size.

#pragma once

#include <optional>

#include "common/tensor.h"
#include "gemm_bf16_panels.h"
#include "split_accumulator.h"

namespace pact_fast::head {

constexpr int64_t kMaxRows = 1024;  // rows of dZ per pass over W: the depth of dW

// Outputs of the gradient ops, each optional: dx [n, D] fp32; d_weight [V, D] bf16 and its lo [V, D] int8.
inline void check_grads(const HeadShape& shape, const std::optional<Tensor>& dx, const std::optional<Tensor>& d_weight,
                        const std::optional<Tensor>& lo) {
  if (dx) check_matrix(*dx, ScalarType::Float, shape.rows, shape.width, "dx");
  STD_TORCH_CHECK(d_weight.has_value() == lo.has_value(), "pact_fast: d_weight and lo must be given together");
  if (d_weight) check_matrix(*d_weight, ScalarType::BFloat16, shape.vocab, shape.width, "d_weight");
  if (lo) check_matrix(*lo, ScalarType::Char, shape.vocab, shape.width, "lo");
}

#ifdef __AVX512BF16__

constexpr int64_t kGradKC = 768;   // columns of a block of dZ
constexpr int64_t kGradMC = 48;    // rows of dW per unit: a multiple of 6, the rows of BRGEMM's inner loop
constexpr int64_t kGradNC = 1024;  // columns of dW per unit of fp32 sums
constexpr int64_t kBand = 32;      // rows of dZ that are rounded together

// Rounds a tile of kBand × 16 elements of dZ, load(row) for each row: into a [·, kGradKC] and, transposed, into
// at [·, ld_at]. Either may be null.
template <typename Load>
void round_tile(const Load& load, bf16_t* a, bf16_t* at, int64_t ld_at) {
  __m512i block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    __m256i half[2];
    for (int j = 0; j < 2; ++j) {
      const int64_t row = 2 * i + j;
      half[j] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(row)));
      if (a != nullptr) _mm256_store_si256(reinterpret_cast<__m256i*>(a + row * kGradKC), half[j]);
    }
    block[i] = interleave_vnni(half[0], half[1]);
  }
  if (at == nullptr) return;
  transpose_16x16(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(at + i * ld_at, block[i]);
}

// A kernel of run_head_grads for up to kMaxRows rows of dZ. dx and d_weight.hi may be null. Dz forms dZ:
// dz.round(v, columns, i, a, at, ld_at) rounds the kBand rows from i on of the block of columns at v, as round_tile
// does, with zeros beyond the last row.
template <typename Dz>
struct Bf16Grads {
  static constexpr int64_t kNR = head::kNR, kKC = kGradKC, kMC = kGradMC, kRowAlign = head::kMC;
  using Guard = AmxTileGuard;

  struct Scratch {
    bf16_t* w_panel;
    float* dw_sums;
  };

  const Dz& dz;
  const bf16_t *x, *weight;
  float* dx;
  SplitAccumulator d_weight;
  HeadShape shape;

  int64_t depth = round_up(shape.rows, kBand);  // of dW
  int64_t panels = ceil_div(shape.width, kNR);
  // dZ by rows and transposed, this block and the next one
  AlignedBuffer<bf16_t> a[2] = {dz_buffer(wants_dx(), 0), dz_buffer(wants_dx(), 1)};
  AlignedBuffer<bf16_t> at[2] = {dz_buffer(wants_dw(), 0), dz_buffer(wants_dw(), 1)};
  AlignedBuffer<bf16_t> x_panels = wants_dw() ? aligned_buffer<bf16_t>(panels * kNR * depth) : nullptr;

  bool wants_dx() const { return dx != nullptr; }
  bool wants_dw() const { return d_weight.hi != nullptr; }

  AlignedBuffer<bf16_t> dz_buffer(bool wanted, int64_t block) const {
    return wanted && block * kKC < shape.vocab ? aligned_buffer<bf16_t>(depth * kKC) : nullptr;
  }

  Scratch layout(ScratchArena& arena) const {
    // floats; a unit uses one of them
    float* piece = arena.take<float>(std::max(/* w_panel */ kKC * kNR / 2, /* dw_sums */ kMC * kGradNC));
    return {reinterpret_cast<bf16_t*>(piece), piece};
  }

  int64_t x_units() const { return wants_dw() ? panels : 0; }
  int64_t bands() const { return depth / kBand; }
  int64_t pack_units() const { return x_units() + bands(); }
  int64_t next_units() const { return bands(); }

  void pack(int64_t u) { u < x_units() ? pack_x(u) : next(0, u - x_units()); }

  // pack B = X of dW.
  void pack_x(int64_t p) {
    pack_b_vnni(x + p * kNR, shape.width, shape.rows, std::min(kNR, shape.width - p * kNR), depth,
                &x_panels[p * kNR * depth]);
  }

  // Rounds a band of the block of dZ at column v.
  void next(int64_t v, int64_t band) {
    const int64_t i = kBand * band, block = v / kKC % 2;
    dz.round(v, std::min(kKC, shape.vocab - v), i, wants_dx() ? &a[block][i * kKC] : nullptr,
             wants_dw() ? &at[block][i] : nullptr, depth);
  }

  void input_grad(int64_t v, int64_t row, int64_t rows, int64_t column, int64_t next_column, const Scratch& scratch) {
    const int64_t width = shape.width, block = std::min(kKC, shape.vocab - v), k = round_up(block, 2);
    const int64_t columns = std::min(kNR, width - column);
    const bf16_t* w = weight + v * width;
    const PanelPrefetch prefetch =
        next_column < width ? PanelPrefetch{w + next_column, width, block, kNR} : PanelPrefetch{};
    pack_b_vnni(w + column, width, block, columns, k, scratch.w_panel);
    gemm_panel(rows, columns, k, &a[v / kKC % 2][row * kKC], kKC, scratch.w_panel, dx + row * width + column, width,
               v > 0, prefetch);
  }

  // First the sums, in the cache, then the accumulation, whose rows follow each other in memory.
  void weight_grad(int64_t v, int64_t row, int64_t rows, const Scratch& scratch) {
    for (int64_t first = 0; first < shape.width; first += kGradNC) {
      const int64_t n = std::min(kGradNC, shape.width - first);
      for (int64_t j = 0; j < n; j += kNR) {
        gemm_panel(rows, std::min(kNR, n - j), depth, &at[v / kKC % 2][row * depth], depth,
                   &x_panels[(first + j) * depth], scratch.dw_sums + j, kGradNC, false);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t place = (v + row + r) * d_weight.ld + first;
        accumulate_row(scratch.dw_sums + r * kGradNC, n, d_weight.hi + place, d_weight.lo + place, d_weight.add);
      }
    }
  }
};

template <typename Dz>
void bf16_head_grads(const Dz& dz, const bf16_t* x, const bf16_t* weight, float* dx, const SplitAccumulator& d_weight,
                     const HeadShape& shape) {
  Bf16Grads<Dz> kernel{dz, x, weight, dx, d_weight, shape};
  run_head_grads(kernel);
}

#endif

}  // namespace pact_fast::head
