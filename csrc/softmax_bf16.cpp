// The head in bf16 without its logits: what is kept of a chunk of rows are the terms of its softmax, in bf16.
//
//     z = x·Wᵀ/T        e = bf16(exp(z − top)), top the largest z of a row in a panel of 64 columns
//     dz = g·(onehot − p)/T,        p = e·exp(top − lse)
//
// A panel of z is worked on while it is in the cache: its terms, and per row its largest z, Σe and Σe·(z − top) in
// fp32. From these come log-prob, entropy and lse of a row. Where a loss asks for no more than dL/dlogprob, dz is a
// term times a number per row and panel, and at the target −g·expm1(logprob)/T: whatever rounds dz for its products
// (grads_bf16.h) forms it along the way. Against logits in fp32 and two row passes (rows.cpp) this is half the
// memory, and with it more rows in a chunk, and one exponential instead of two. The rounding of a term costs as much
// as that of dz: one part in 256 at most.
//
// One thread owns a panel, or the statistics of a row, and adds in a fixed order, so that results do not depend on the
// number of threads. The twin in plain torch: pact_fast/kernels/rows_torch.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "grads_bf16.h"

namespace pact_fast::bf16 {
namespace {

// A chunk of n rows, and what is known of each.
struct Rows {
  const Bits* weight;
  int64_t n, vocab, width;
  const int64_t* target;
  const float* temperature;
  float *logprob, *lse, *entropy;
};

// Of which rows dz is wanted, row source[j] at place j, and dL/dlogprob of all rows.
struct Wanted {
  const int64_t* source;
  int64_t places;
  const float* g;
};

#ifdef __AVX512BF16__

// Below −87, exp is no normal number any more; there it is cut off, which adds 2e−38 to sums that are at least 1.
__m512 cut(__m512 x) { return _mm512_max_ps(_mm512_set1_ps(-87.0f), x); }  // of two, the second one if it is NaN

// exp(x) for −87 ≤ x ≤ 0, within 2⁻²³ and what log2(e)·x is rounded by; exactly 1 at 0.
__m512 exp_of(__m512 x) {
  const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f));
  const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(y, n);
  __m512 power = _mm512_set1_ps(1.3264727313e-3f);  // of 2, minimax on ±1/2
  for (const float c : {9.6715129912e-3f, 5.5507335812e-2f, 2.4022242427e-1f, 6.9314700365e-1f, 1.0f}) {
    power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(c));
  }
  return _mm512_scalef_ps(power, n);
}

// The first or the last 8 of 16 numbers, in fp64.
__m512d wide(__m512 x, int half) {
  return _mm512_cvtps_pd(half == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1));
}

// The statistics of all rows, their terms and, per panel and row [panels, n], the largest z; both may be null.
class Forward {
 public:
  Forward(const Bits* x, const Rows& rows, Bits* terms, float* tops)
      : rows_(rows), panels_{Even(x, rows.n, rows.width), rows.weight, rows.n, rows.vocab, rows.width}, terms_(terms),
        sum_(buffer<float>(panels_.count() * rows.n)), weighted_(buffer<float>(panels_.count() * rows.n)) {
    if (tops == nullptr) own_tops_ = buffer<float>(panels_.count() * rows.n);
    tops_ = tops == nullptr ? own_tops_.get() : tops;
  }

  void run() {
    // one piece of z is enough, 16 KiB in the first-level cache, unless all of them wait for the products of more depth
    const int64_t step = rows_.width > kDepth ? kPanel : 0, pieces = rows_.width > kDepth ? rows_.n : kPiece;
    share(panels_.count(), panels_.packed() + 2 * pieces * kPanel, [&](int64_t p, Bits* scratch) {
      const auto z = [&](int64_t i) { return reinterpret_cast<float*>(scratch + panels_.packed()) + i * step; };
      panels_.panel(p, scratch, kPanel, z, [&](int64_t i, int64_t m) {
        for (int64_t r = 0; r < m; ++r) row(p, i + r, z(i) + r * kPanel);
      });
    });
    share(ceil_div(rows_.n, 16), 0, [&](int64_t unit, Bits*) { statistics(16 * unit); });
  }

 private:
  // One row of panel p: its terms and its entries in the tables.
  void row(int64_t p, int64_t i, const float* z) {
    const int64_t columns = rows_.vocab - p * kPanel, place = p * rows_.n + i, target = rows_.target[i] - p * kPanel;
    const float inverse = 1.0f / rows_.temperature[i], lowest = std::numeric_limits<float>::lowest();
    __m512 scaled[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const auto mask = static_cast<__mmask16>(lanes(columns - 16 * j));
      const __m512 raw = _mm512_mask_loadu_ps(_mm512_set1_ps(lowest), mask, z + 16 * j);
      scaled[j] = _mm512_mul_ps(raw, _mm512_set1_ps(inverse));
    }
    const __m512 larger = _mm512_max_ps(_mm512_max_ps(scaled[0], scaled[1]), _mm512_max_ps(scaled[2], scaled[3]));
    const float top = std::max(_mm512_reduce_max_ps(larger), lowest);
    __m512 sum = _mm512_setzero_ps(), weighted = sum, term[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 below = cut(_mm512_sub_ps(scaled[j], _mm512_set1_ps(top)));
      term[j] = exp_of(below);
      sum = _mm512_add_ps(sum, term[j]);
      weighted = _mm512_fmadd_ps(term[j], below, weighted);
    }
    tops_[place] = top;
    sum_[place] = _mm512_reduce_add_ps(sum);
    weighted_[place] = _mm512_reduce_add_ps(weighted);
    if (target >= 0 && target < kPanel) rows_.logprob[i] = z[target] * inverse;  // until `statistics` has the rest
    if (terms_ == nullptr) return;
    for (int j = 0; j < 4; j += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh(term[j + 1], term[j]);
      _mm512_storeu_si512(terms_ + place * kPanel + 16 * j, reinterpret_cast<__m512i>(both));
    }
  }

  // Of the 16 rows from i on.
  void statistics(int64_t i) {
    const auto mask = static_cast<__mmask16>(lanes(rows_.n - i));
    const auto at = [&](const float* table, int64_t p) { return _mm512_maskz_loadu_ps(mask, table + p * rows_.n + i); };
    __m512 top = at(tops_, 0);
    for (int64_t p = 1; p < panels_.count(); ++p) top = _mm512_max_ps(top, at(tops_, p));
    __m512d sum[2] = {}, weighted[2] = {};  // in fp64: where one panel is nearly everything, fp32 would lose the others
    for (int64_t p = 0; p < panels_.count(); ++p) {
      const __m512 below = cut(_mm512_sub_ps(at(tops_, p), top)), scale = exp_of(below), own = at(sum_.get(), p);
      const __m512 moved = _mm512_mul_ps(scale, _mm512_fmadd_ps(below, own, at(weighted_.get(), p)));
      const __m512 part = _mm512_mul_ps(scale, own);
      for (int half = 0; half < 2; ++half) {
        sum[half] = _mm512_add_pd(sum[half], wide(part, half));
        weighted[half] = _mm512_add_pd(weighted[half], wide(moved, half));
      }
    }
    float tops[16];
    _mm512_storeu_ps(tops, top);
    for (int j = 0; j < 16 && i + j < rows_.n; ++j) {
      const double total = sum[j / 8][j % 8], log_sum = std::log(total);
      // not z − lse: where p → 1 the rounded lse would be all that is left
      rows_.logprob[i + j] = static_cast<float>(static_cast<double>(rows_.logprob[i + j]) - tops[j] - log_sum);
      rows_.lse[i + j] = static_cast<float>(tops[j] + log_sum);
      rows_.entropy[i + j] = static_cast<float>(log_sum - weighted[j / 8][j % 8] / total);
    }
  }

  const Rows& rows_;
  LogitPanels panels_;
  Bits* terms_;
  float* tops_;
  pact_fast::Buffer<float> sum_, weighted_, own_tops_;
};

// dz of the wanted rows from their terms; see Grads.
class Gradient {
 public:
  Gradient(const Rows& rows, const Bits* terms, const float* tops, const Wanted& wanted)
      : n_(rows.n), terms_(terms), tops_(tops), depth_(round_up(wanted.places, 32)),
        row_(buffer<int32_t>(depth_)), target_(buffer<int64_t>(depth_)), lse_(buffer<float>(depth_)),
        factor_(buffer<float>(depth_)), at_target_(buffer<Bits>(depth_)) {
    for (int64_t j = 0; j < depth_; ++j) {
      const bool there = j < wanted.places;
      const int64_t i = wanted.source[there ? j : 0];
      const float g = there ? wanted.g[i] / rows.temperature[i] : 0.0f;  // rows beyond the last place become zeros
      row_[j] = static_cast<int32_t>(i);
      target_[j] = rows.target[i];
      lse_[j] = rows.lse[i];
      factor_[j] = -g;
      // 1 − p by expm1: where p → 1, g − g·p would lose every digit
      at_target_[j] = c10::BFloat16(-g * std::expm1(rows.logprob[i])).x;
    }
  }

  void round(int64_t v, int64_t columns, int64_t i, Bits* a, Bits* at, int64_t depth) const {
    float factors[32];
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t p = (v + j) / kPanel;
      if (j % kPanel == 0) panel_factors(p, i, factors);
      const Bits* panel = terms_ + p * n_ * kPanel + j % kPanel;
      const auto load = [&](int64_t r) {
        const __m256i term = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + row_[i + r] * kPanel));
        const __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(term), 16));
        return _mm512_mul_ps(value, _mm512_set1_ps(factors[r]));
      };
      round_tile(load, a == nullptr ? nullptr : a + j, at == nullptr ? nullptr : at + j * depth, depth);
    }
    for (int64_t r = 0; r < 32; ++r) {
      const int64_t j = target_[i + r] - v;
      if (j < 0 || j >= columns) continue;
      if (a != nullptr) a[r * kSlab + j] = at_target_[i + r];
      if (at != nullptr) at[j * depth + r] = at_target_[i + r];
    }
  }

 private:
  // What turns the terms of 32 places from i on, in panel p, into dz.
  void panel_factors(int64_t p, int64_t i, float* factors) const {
    for (int64_t r = 0; r < 32; r += 16) {
      const __m512i row = _mm512_load_si512(&row_[i + r]);
      const __m512 top = _mm512_i32gather_ps(row, tops_ + p * n_, sizeof(float));
      const __m512 scale = exp_of(cut(_mm512_sub_ps(top, _mm512_load_ps(&lse_[i + r]))));
      _mm512_storeu_ps(factors + r, _mm512_mul_ps(scale, _mm512_load_ps(&factor_[i + r])));
    }
  }

  int64_t n_;
  const Bits* terms_;
  const float* tops_;
  int64_t depth_;
  pact_fast::Buffer<int32_t> row_;
  pact_fast::Buffer<int64_t> target_;
  pact_fast::Buffer<float> lse_, factor_;
  Buffer at_target_;
};

void forward(const Bits* x, const Rows& rows, Bits* terms, float* tops) { Forward(x, rows, terms, tops).run(); }

void backward(const Rows& rows, const Bits* terms, const float* tops, const Wanted& wanted, const Bits* x, float* dx,
              const Sums& d_weight) {
  const Gradient dz(rows, terms, tops, wanted);
  Grads<Gradient>{dz, x, rows.weight, dx, d_weight, wanted.places, rows.vocab, rows.width}.run();
}

#else  // callers ask bf16_products_ready first

void forward(const Bits*, const Rows&, Bits*, float*) {}
void backward(const Rows&, const Bits*, const float*, const Wanted&, const Bits*, float*, const Sums&) {}

#endif

template <typename... Tensors>
void check_vectors(ScalarType type, int64_t n, const Tensors&... vectors) {
  const auto fits = [&](const Tensor& t) {
    return t.scalar_type() == type && t.dim() == 1 && t.size(0) == n && t.is_contiguous();
  };
  STD_TORCH_CHECK((fits(vectors) && ...), "bf16 softmax: vectors by row must be contiguous, [", n, "], int64 or fp32");
}

void check_chunk(const Tensor& terms, const Tensor& tops, int64_t n, int64_t vocab) {
  const int64_t panels = ceil_div(vocab, kPanel);
  const auto of = [&](const Tensor& t, ScalarType type, int64_t dim) {
    return t.scalar_type() == type && t.dim() == dim && t.size(0) == panels && t.size(1) == n && t.is_contiguous();
  };
  STD_TORCH_CHECK(of(tops, ScalarType::Float, 2) && of(terms, ScalarType::BFloat16, 3) && terms.size(2) == kPanel,
                  "bf16 softmax: terms must be bf16 [panels, n, ", kPanel, "], tops fp32 [panels, n], contiguous");
}

}  // namespace
}  // namespace pact_fast::bf16

using namespace pact_fast::bf16;

// x [n, D], weight [V, D] bf16; target [n] int64, temperature [n] fp32. Out: logprob, lse, entropy [n] fp32 and, both
// or neither, what gradients are made of: terms [panels of 64 columns, n, 64] bf16, tops [panels, n] fp32.
void bf16_softmax(const Tensor x, const Tensor weight, const Tensor target, const Tensor temperature,
                  std::optional<Tensor> terms, std::optional<Tensor> tops, Tensor logprob, Tensor lse, Tensor entropy) {
  check_factors(x, weight);
  const int64_t n = x.size(0), vocab = weight.size(0);
  check_vectors(ScalarType::Long, n, target);
  check_vectors(ScalarType::Float, n, temperature, logprob, lse, entropy);
  STD_TORCH_CHECK(terms.has_value() == tops.has_value(), "bf16 softmax: terms and tops come together");
  if (terms) check_chunk(*terms, *tops, n, vocab);
  const Rows rows{data<Bits>(weight), n, vocab, x.size(1), data<int64_t>(target), data<float>(temperature),
                  data<float>(logprob), data<float>(lse), data<float>(entropy)};
  forward(data<Bits>(x), rows, terms ? data<Bits>(*terms) : nullptr, tops ? data<float>(*tops) : nullptr);
}

// From the terms of n rows, the gradients of m ≤ 1024 of them: row source[j] of the chunk is row j of x and dx [m, D].
// g, target, temperature and the statistics are [n], by row of the chunk. Results as in bf16_grads.
void bf16_softmax_grads(const Tensor terms, const Tensor tops, const Tensor source, const Tensor target,
                        const Tensor temperature, const Tensor logprob, const Tensor lse, const Tensor g,
                        const Tensor x, const Tensor weight, std::optional<Tensor> dx, std::optional<Tensor> d_weight,
                        std::optional<Tensor> rest, bool add) {
  check_factors(x, weight);
  check_grads(x, weight, dx, d_weight, rest);
  const int64_t n = target.size(0), vocab = weight.size(0), places = x.size(0), width = x.size(1);
  check_chunk(terms, tops, n, vocab);
  check_vectors(ScalarType::Long, n, target);
  check_vectors(ScalarType::Long, places, source);
  check_vectors(ScalarType::Float, n, temperature, logprob, lse, g);
  STD_TORCH_CHECK(places <= kRows, "bf16 softmax: at most ", kRows, " rows at a time");
  const Rows rows{data<Bits>(weight), n, vocab, width, data<int64_t>(target), data<float>(temperature),
                  data<float>(logprob), data<float>(lse), nullptr};
  const Sums sums{d_weight ? data<Bits>(*d_weight) : nullptr, rest ? data<int8_t>(*rest) : nullptr, width, add};
  if (places == 0) return;
  backward(rows, data<Bits>(terms), data<float>(tops), {data<int64_t>(source), places, data<float>(g)}, data<Bits>(x),
           dx ? data<float>(*dx) : nullptr, sums);
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def(
      "bf16_softmax(Tensor x, Tensor weight, Tensor target, Tensor temperature, Tensor(a!)? terms, Tensor(b!)? tops, "
      "Tensor(c!) logprob, Tensor(d!) lse, Tensor(e!) entropy) -> ()");
  m.def(
      "bf16_softmax_grads(Tensor terms, Tensor tops, Tensor source, Tensor target, Tensor temperature, Tensor logprob, "
      "Tensor lse, Tensor g, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? d_weight, Tensor(c!)? rest, "
      "bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("bf16_softmax", TORCH_BOX(&bf16_softmax));
  m.impl("bf16_softmax_grads", TORCH_BOX(&bf16_softmax_grads));
}
