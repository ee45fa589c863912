// out = x·Wᵀ (+ bias) for few rows x on CPUs with AVX-512: the linear layers of a decoder that generates one token of
// each sequence per step.
//
// Every weight is used once per row of x, so the time is that of reading W from memory, if nothing else is done with
// it: W is neither packed nor copied.
//
//  * bf16: outᵀ = W·xᵀ by BRGEMM (common/brgemm.h), with W as the operand A, which is row-major. Only xᵀ is packed,
//    in VNNI layout. On AMX, up to 64 rows of x cost hardly more than one. W may also be fp32, as it is under
//    autocast: a block of it is rounded to bf16 in L2, and not the whole of it in memory.
//  * fp32: dot products along the rows of W, 16 at a time: their 16 sums of lanes are one register.
//  * The hardware prefetcher keeps up: W is read from its beginning to its end. Software prefetches cost time.
//
// Every output element is summed in an order that depends on neither the number of rows nor of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "common/parallel.h"
#include "common/tensor.h"

#ifdef __AVX512F__
#include "common/isa.h"
#include "common/sum_lanes.h"
#endif

#ifdef __AVX512BF16__
#include "common/brgemm.h"
#include "common/transpose.h"
#endif

namespace pact_fast {
namespace {

// x [rows, depth] with row stride ldx, W [columns, depth], bias [columns] or null, out [rows, columns].
template <typename T, typename Weight, typename Out>
struct SkinnyProblem {
  const T* x;
  int64_t ldx;
  const Weight *weight, *bias;
  Out* out;
  int64_t rows, columns, depth;
};

#ifdef __AVX512F__

constexpr int64_t kBlock = 64;  // rows of W in a unit of work

// ---- fp32

constexpr int kMaxDotRows = 8;  // rows of x per pass over a block of W

// Dot products of m rows of x with 16/m rows of W, of which `valid` are there; x and out begin at the first of them.
template <int m, typename Problem>
void dot_tile(const Problem& p, int64_t row, int64_t column, int64_t valid) {
  constexpr int n = 16 / m;
  const float* w[n];
  for (int j = 0; j < n; ++j) w[j] = p.weight + (column + std::min<int64_t>(j, valid - 1)) * p.depth;
  const float* x = p.x + row * p.ldx;
  __m512 sums[16] = {};
  for (int64_t k = 0; k < p.depth; k += 16) {
    const __mmask16 mask = lane_mask16(p.depth - k);
    __m512 factors[n];
#pragma GCC unroll 16
    for (int j = 0; j < n; ++j) factors[j] = _mm512_maskz_loadu_ps(mask, w[j] + k);
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      const __m512 xs = _mm512_maskz_loadu_ps(mask, x + i * p.ldx + k);
#pragma GCC unroll 16
      for (int j = 0; j < n; ++j) sums[i * n + j] = _mm512_fmadd_ps(xs, factors[j], sums[i * n + j]);
    }
  }
  alignas(64) float totals[16];
  _mm512_store_ps(totals, sum_lanes(sums));
  for (int i = 0; i < m; ++i) {
    for (int64_t j = 0; j < valid; ++j) {
      p.out[(row + i) * p.columns + column + j] = totals[i * n + j] + (p.bias ? p.bias[column + j] : 0.0f);
    }
  }
}

template <int m>
void dot_rows(const SkinnyProblem<float, float, float>& p, int64_t row, int64_t begin, int64_t end) {
  constexpr int64_t n = 16 / m;
  for (int64_t column = begin; column < end; column += n) {
    dot_tile<m>(p, row, column, std::min(n, end - column));
  }
}

void skinny(const SkinnyProblem<float, float, float>& p) {
  static constexpr decltype(&dot_rows<1>) kKernels[kMaxDotRows] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,
                                                                   dot_rows<5>, dot_rows<6>, dot_rows<7>, dot_rows<8>};
  parallel_for_dynamic(ceil_div(p.columns, kBlock), [&](int64_t unit) {
    const int64_t begin = unit * kBlock, end = std::min(begin + kBlock, p.columns);
    for (int64_t row = 0; row < p.rows; row += kMaxDotRows) {
      kKernels[std::min<int64_t>(kMaxDotRows, p.rows - row) - 1](p, row, begin, end);
    }
  });
}

#endif

// ---- bf16

#ifdef __AVX512BF16__

constexpr int64_t kRows = 64;  // rows of x per call of BRGEMM

// xᵀ in VNNI layout: panels of up to kRows rows, padded with zeros to a multiple of 16, of which BRGEMM then meets four
// shapes only.
struct PackedRows {
  int64_t depth, rows;
  AlignedBuffer<bf16_t> panels = aligned_buffer<bf16_t>(round_up(rows, 16) * round_up(depth, 32));

  int64_t width(int64_t row) const { return std::min(kRows, round_up(rows - row, 16)); }
  bf16_t* panel(int64_t row) const { return &panels[row * round_up(depth, 32)]; }

  void pack(const bf16_t* x, int64_t ldx) const {
    for (int64_t row = 0; row < rows; row += kRows) {
      const int64_t ld = 2 * width(row);
      for (int64_t r = 0; r < width(row); r += 16) {
        for (int64_t k = 0; k < depth; k += 32) {
          __m512i block[16];
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) {
            const __mmask32 mask = row + r + i < rows ? lane_mask32(depth - k) : 0;
            block[i] = _mm512_maskz_loadu_epi16(mask, x + (row + r + i) * ldx + k);
          }
          transpose_16x16(block);
#pragma GCC unroll 16
          for (int i = 0; i < 16; ++i) _mm512_store_si512(panel(row) + (k / 2 + i) * ld + 2 * r, block[i]);
        }
      }
    }
  }
};

inline __m512 load_some(__mmask16 mask, const float* p) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load_some(__mmask16 mask, const bf16_t* p) { return bf16_to_fp32(_mm256_maskz_loadu_epi16(mask, p)); }

// out [rows, columns] ← sumsᵀ + bias; sums [columns, ld].
template <typename Bias, typename Out>
void store_transposed(const float* sums, int64_t ld, const Bias* bias, int64_t rows, int64_t columns, Out* out,
                      int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = c + i < columns ? _mm512_loadu_si512(sums + (c + i) * ld + r) : _mm512_setzero_si512();
      }
      transpose_16x16(block);
      const __mmask16 mask = lane_mask16(columns - c);
      const __m512 added = bias ? load_some(mask, bias + c) : _mm512_setzero_ps();
      for (int i = 0; i < std::min<int64_t>(16, rows - r); ++i) {
        const __m512 sum = _mm512_add_ps(_mm512_castsi512_ps(block[i]), added);
        Out* to = out + (r + i) * ld_out + c;
        if constexpr (sizeof(Out) == 4) {
          _mm512_mask_storeu_ps(to, mask, sum);
        } else {
          _mm256_mask_storeu_epi16(to, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
        }
      }
    }
  }
}

// `count` elements of W as bf16: where they are, or rounded into `rounded`.
inline const bf16_t* as_bf16(const bf16_t* w, int64_t, bf16_t*) { return w; }

inline const bf16_t* as_bf16(const float* w, int64_t count, bf16_t* rounded) {
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = lane_mask32(count - i);
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), w + i),
                 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), w + i + 16);
    _mm512_mask_storeu_epi16(rounded + i, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  return rounded;
}

template <typename Weight, typename Out>
void skinny(const SkinnyProblem<bf16_t, Weight, Out>& p) {
  struct Scratch {
    float* sums;
    bf16_t* rounded;
  };
  const PackedRows x{p.depth, p.rows};
  x.pack(p.x, p.ldx);
  const auto layout = [&](ScratchArena& arena) {
    const int64_t block = std::is_same_v<Weight, float> ? kBlock * p.depth : 0;
    return Scratch{arena.take<float>(kBlock * kRows), arena.take<bf16_t>(block)};
  };
  parallel_for_dynamic<AmxTileGuard>(ceil_div(p.columns, kBlock), layout, [&](int64_t unit, const Scratch& s) {
    const int64_t column = unit * kBlock, columns = std::min(kBlock, p.columns - column);
    const bf16_t* w = as_bf16(p.weight + column * p.depth, columns * p.depth, s.rounded);
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t width = x.width(row);
      brgemm(columns, width, p.depth, w, p.depth, x.panel(row), width, s.sums, width, false);
      store_transposed(s.sums, width, p.bias ? p.bias + column : nullptr, std::min(kRows, p.rows - row), columns,
                       p.out + row * p.columns + column, p.columns);
    }
  });
}

#endif

// ---- op

bool ready(ScalarType type) {
#ifdef __AVX512F__
  if (type == ScalarType::Float) return true;
#endif
#ifdef __AVX512BF16__
  static const bool bf16 = brgemm_ready<bf16_t>();
  return type == ScalarType::BFloat16 && bf16;
#else
  return false;
#endif
}

bool skinny_gemm_ready(ScalarType type) { return ready(type); }

template <typename T, typename Weight, typename Out>
void run(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& out) {
#ifdef __AVX512F__
  if (x.size(0) == 0) return;
  skinny(SkinnyProblem<T, Weight, Out>{data_ptr<const T>(x), x.stride(0), data_ptr<const Weight>(weight),
                                       data_ptr<const Weight>(bias), data_ptr<Out>(out), x.size(0), weight.size(0),
                                       x.size(1)});
#endif
}

// out ← x·Wᵀ + bias. x [n, D] with contiguous rows, weight [V, D] contiguous, bias [V] or missing, out [n, V]
// contiguous. All fp32; or x bf16, weight and bias both bf16 or both fp32 (rounded to bf16 here), out bf16 or fp32, D
// even.
void skinny_gemm(const Tensor x, const Tensor weight, std::optional<Tensor> bias, Tensor out) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(ready(type), "pact_fast: no skinny GEMM for this dtype on this CPU");
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) > 0, "pact_fast: x and weight must be matrices");
  const int64_t rows = x.size(0), columns = weight.size(0), depth = x.size(1);
  STD_TORCH_CHECK(type == ScalarType::Float || depth % 2 == 0, "pact_fast: bf16 needs an even depth");
  const ScalarType weight_type = weight.scalar_type() == type ? type : ScalarType::Float;
  check_rows(x, type, rows, depth, "x");
  check_matrix(weight, weight_type, columns, depth, "weight");
  check_vector(bias, weight_type, columns, "bias");
  const ScalarType out_type = out.scalar_type() == type ? type : ScalarType::Float;
  check_matrix(out, out_type, rows, columns, "out");
  if (type == ScalarType::Float) return run<float, float, float>(x, weight, bias, out);
#ifdef __AVX512BF16__
  const bool wide = weight_type == ScalarType::Float, wide_out = out_type == ScalarType::Float;
  if (wide) return (wide_out ? run<bf16_t, float, float> : run<bf16_t, float, bf16_t>)(x, weight, bias, out);
  return (wide_out ? run<bf16_t, bf16_t, float> : run<bf16_t, bf16_t, bf16_t>)(x, weight, bias, out);
#endif
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("skinny_gemm_ready(ScalarType dtype) -> bool");
  m.def("skinny_gemm(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("skinny_gemm_ready", TORCH_BOX(&pact_fast::skinny_gemm_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) { m.impl("skinny_gemm", TORCH_BOX(&pact_fast::skinny_gemm)); }
