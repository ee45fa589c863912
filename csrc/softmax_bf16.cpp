// The bf16 head without fp32 logits: a chunk of rows keeps the exponentials of its softmax, in bf16.
//
//     z = x·Wᵀ/T        exp_z = bf16(exp(z − panel_max)), panel_max: the largest z of a row in a panel of 64 columns
//     dz = g·(onehot − p)/T,        p = exp_z·exp(panel_max − lse)
//
// While a panel of z is in the cache, its exponentials are stored, and per row panel_max, Σ exp_z and Σ exp_z·(z −
// panel_max) in fp32: log-prob, entropy and log-sum-exp of the row follow from them. For a loss that asks for no
// more than g = dL/dlogprob, dz is an exponential times one factor per row and panel, and −g·expm1(logprob)/T at
// the target: it is formed while it is rounded for its GEMMs (gemm_bf16_grads.h). Against fp32 logits and two
// softmax passes (softmax_fp32.cpp) this takes half the memory, so that chunks have more rows, and one exponential
// instead of two. Rounding exp_z costs as much as rounding dz: one part in 256 at most.
//
// One thread owns a panel, or the statistics of a row, and adds in a fixed order: results do not depend on the
// number of threads. Reference in plain torch: pact_fast/kernels/head/softmax_torch.py.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "common/exp.h"
#include "common/tensor.h"
#include "gemm_bf16_grads.h"

namespace pact_fast::head {
namespace {

// A chunk of n rows: inputs, and the statistics of each row.
struct HeadChunk {
  const bf16_t* weight;
  HeadShape shape;
  const int64_t* target;
  const float* temperature;
  float *logprob, *lse, *entropy;
};

// The rows with a gradient, source[j] at place j, and dL/dlogprob of all rows.
struct ActiveRows {
  const int64_t* source;
  int64_t count;
  const float* g;
};

#ifdef __AVX512BF16__

// The first (half = 0) or last (half = 1) 8 of 16 lanes, in fp64.
__m512d to_fp64(__m512 x, int half) {
  return _mm512_cvtps_pd(half == 0 ? _mm512_castps512_ps256(x) : _mm512_extractf32x8_ps(x, 1));
}

// The statistics of all rows and, unless null, exp_z [panels, n, kNR] and panel_max [panels, n].
class SoftmaxForward {
 public:
  SoftmaxForward(const bf16_t* x, const HeadChunk& chunk, bf16_t* exp_z, float* panel_max)
      : chunk_(chunk),
        n_(chunk.shape.rows),
        panels_(x, chunk.weight, chunk.shape),
        exp_z_(exp_z),
        panel_max_(panel_max),
        sum_(aligned_buffer<float>(panels_.count() * n_)),
        weighted_(aligned_buffer<float>(panels_.count() * n_)) {
    if (panel_max_ != nullptr) return;
    own_panel_max_ = aligned_buffer<float>(panels_.count() * n_);
    panel_max_ = own_panel_max_.get();
  }

  void run() {
    // One block of kMC rows of z is enough, 16 KiB in L1, unless all rows wait for the next kKC of the depth.
    const bool whole = chunk_.shape.width > kKC;
    struct Scratch {
      bf16_t* packed;
      float* z;
    };
    const auto layout = [&](ScratchArena& arena) {
      return Scratch{panels_.take_panel(arena), arena.take<float>(/* z */ (whole ? n_ : kMC) * kNR)};
    };
    parallel_for_dynamic<AmxTileGuard>(panels_.count(), layout, [&](int64_t p, const Scratch& scratch) {
      const auto z = [&](int64_t i) { return scratch.z + (whole ? i * kNR : 0); };
      panels_.compute(p, scratch.packed, kNR, z, [&](int64_t i, int64_t m) {
        for (int64_t r = 0; r < m; ++r) softmax_panel(p, i + r, z(i) + r * kNR);
      });
    });
    parallel_for_dynamic(ceil_div(n_, 16), [&](int64_t unit) { merge_panels(16 * unit); });
  }

 private:
  // Row i of panel p: its exponentials and its entries in the tables [panels, n].
  void softmax_panel(int64_t p, int64_t i, const float* z) {
    const int64_t columns = chunk_.shape.vocab - p * kNR, place = p * n_ + i, target = chunk_.target[i] - p * kNR;
    const float inverse_temperature = 1.0f / chunk_.temperature[i], lowest = std::numeric_limits<float>::lowest();
    __m512 scaled[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __mmask16 mask = lane_mask16(columns - 16 * j);
      const __m512 raw = _mm512_mask_loadu_ps(_mm512_set1_ps(lowest), mask, z + 16 * j);
      scaled[j] = _mm512_mul_ps(raw, _mm512_set1_ps(inverse_temperature));
    }
    const __m512 larger = _mm512_max_ps(_mm512_max_ps(scaled[0], scaled[1]), _mm512_max_ps(scaled[2], scaled[3]));
    const float max = std::max(_mm512_reduce_max_ps(larger), lowest);
    __m512 sum = _mm512_setzero_ps(), weighted = sum, exp_z[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512 below = clamp_exponent(_mm512_sub_ps(scaled[j], _mm512_set1_ps(max)));
      exp_z[j] = exp_nonpositive(below);
      sum = _mm512_add_ps(sum, exp_z[j]);
      weighted = _mm512_fmadd_ps(exp_z[j], below, weighted);
    }
    panel_max_[place] = max;
    sum_[place] = _mm512_reduce_add_ps(sum);
    weighted_[place] = _mm512_reduce_add_ps(weighted);
    if (target >= 0 && target < kNR) chunk_.logprob[i] = z[target] * inverse_temperature;  // finished by merge_panels
    if (exp_z_ == nullptr) return;
    for (int j = 0; j < 4; j += 2) {
      const __m512bh both = _mm512_cvtne2ps_pbh(exp_z[j + 1], exp_z[j]);
      _mm512_storeu_si512(exp_z_ + place * kNR + 16 * j, reinterpret_cast<__m512i>(both));
    }
  }

  // Statistics of the 16 rows from i on.
  void merge_panels(int64_t i) {
    const __mmask16 mask = lane_mask16(n_ - i);
    const auto at = [&](const float* table, int64_t p) { return _mm512_maskz_loadu_ps(mask, table + p * n_ + i); };
    __m512 max = at(panel_max_, 0);
    for (int64_t p = 1; p < panels_.count(); ++p) max = _mm512_max_ps(max, at(panel_max_, p));
    __m512d sum[2] = {}, weighted[2] = {};  // in fp64: where one panel is nearly everything, fp32 would lose the others
    for (int64_t p = 0; p < panels_.count(); ++p) {
      const __m512 below = clamp_exponent(_mm512_sub_ps(at(panel_max_, p), max)), scale = exp_nonpositive(below);
      const __m512 panel_sum = at(sum_.get(), p);
      const __m512 rescaled_weighted = _mm512_mul_ps(scale, _mm512_fmadd_ps(below, panel_sum, at(weighted_.get(), p)));
      const __m512 rescaled_sum = _mm512_mul_ps(scale, panel_sum);
      for (int half = 0; half < 2; ++half) {
        sum[half] = _mm512_add_pd(sum[half], to_fp64(rescaled_sum, half));
        weighted[half] = _mm512_add_pd(weighted[half], to_fp64(rescaled_weighted, half));
      }
    }
    float row_max[16];
    _mm512_storeu_ps(row_max, max);
    for (int j = 0; j < 16 && i + j < n_; ++j) {
      const double total = sum[j / 8][j % 8], log_sum = std::log(total);
      // not z − lse: where p → 1, the rounded lse would be all that is left
      const double logit = static_cast<double>(chunk_.logprob[i + j]);
      chunk_.logprob[i + j] = static_cast<float>(logit - row_max[j] - log_sum);
      chunk_.lse[i + j] = static_cast<float>(row_max[j] + log_sum);
      chunk_.entropy[i + j] = static_cast<float>(log_sum - weighted[j / 8][j % 8] / total);
    }
  }

  const HeadChunk& chunk_;
  const int64_t n_;
  LogitPanels panels_;
  bf16_t* exp_z_;
  float* panel_max_;
  AlignedBuffer<float> sum_, weighted_, own_panel_max_;
};

// dz of the active rows from exp_z, for Bf16Grads.
class SoftmaxDz {
 public:
  SoftmaxDz(const HeadChunk& chunk, const bf16_t* exp_z, const float* panel_max, const ActiveRows& active)
      : n_(chunk.shape.rows),
        exp_z_(exp_z),
        panel_max_(panel_max),
        places_(round_up(active.count, kBand)),
        row_(aligned_buffer<int32_t>(places_)),
        target_(aligned_buffer<int64_t>(places_)),
        lse_(aligned_buffer<float>(places_)),
        factor_(aligned_buffer<float>(places_)),
        at_target_(aligned_buffer<bf16_t>(places_)) {
    for (int64_t j = 0; j < places_; ++j) {
      const bool is_row = j < active.count;
      const int64_t i = active.source[is_row ? j : 0];
      const float g = is_row ? active.g[i] / chunk.temperature[i] : 0.0f;  // places beyond the last row become zeros
      row_[j] = static_cast<int32_t>(i);
      target_[j] = chunk.target[i];
      lse_[j] = chunk.lse[i];
      factor_[j] = -g;
      // 1 − p by expm1: where p → 1, g − g·p would lose every digit
      at_target_[j] = c10::BFloat16(-g * std::expm1(chunk.logprob[i])).x;
    }
  }

  void round(int64_t v, int64_t columns, int64_t i, bf16_t* a, bf16_t* at, int64_t ld_at) const {
    float factors[kBand];
    for (int64_t j = 0; j < columns; j += 16) {
      const int64_t p = (v + j) / kNR;
      if (j % kNR == 0) panel_factors(p, i, factors);
      const bf16_t* panel = exp_z_ + p * n_ * kNR + j % kNR;
      const auto load = [&](int64_t r) {
        return _mm512_mul_ps(loadu(panel + row_[i + r] * kNR), _mm512_set1_ps(factors[r]));
      };
      round_tile(load, a == nullptr ? nullptr : a + j, at == nullptr ? nullptr : at + j * ld_at, ld_at);
    }
    for (int64_t r = 0; r < kBand; ++r) {
      const int64_t j = target_[i + r] - v;
      if (j < 0 || j >= columns) continue;
      if (a != nullptr) a[r * kGradKC + j] = at_target_[i + r];
      if (at != nullptr) at[j * ld_at + r] = at_target_[i + r];
    }
  }

 private:
  // dz/exp_z of the kBand places from i on, in panel p.
  void panel_factors(int64_t p, int64_t i, float* factors) const {
    for (int64_t r = 0; r < kBand; r += 16) {
      const __m512i row = _mm512_load_si512(&row_[i + r]);
      const __m512 max = _mm512_i32gather_ps(row, panel_max_ + p * n_, sizeof(float));
      const __m512 scale = exp_nonpositive(clamp_exponent(_mm512_sub_ps(max, _mm512_load_ps(&lse_[i + r]))));
      _mm512_storeu_ps(factors + r, _mm512_mul_ps(scale, _mm512_load_ps(&factor_[i + r])));
    }
  }

  int64_t n_;
  const bf16_t* exp_z_;
  const float* panel_max_;
  int64_t places_;
  AlignedBuffer<int32_t> row_;
  AlignedBuffer<int64_t> target_;
  AlignedBuffer<float> lse_, factor_;
  AlignedBuffer<bf16_t> at_target_;
};

void forward(const bf16_t* x, const HeadChunk& chunk, bf16_t* exp_z, float* panel_max) {
  SoftmaxForward(x, chunk, exp_z, panel_max).run();
}

void backward(const HeadChunk& chunk, const bf16_t* exp_z, const float* panel_max, const ActiveRows& active,
              const bf16_t* x, float* dx, const SplitAccumulator& d_weight) {
  const SoftmaxDz dz(chunk, exp_z, panel_max, active);
  bf16_head_grads(dz, x, chunk.weight, dx, d_weight, {active.count, chunk.shape.vocab, chunk.shape.width});
}

#else  // callers ask bf16_gemm_ready first

void forward(const bf16_t*, const HeadChunk&, bf16_t*, float*) {}
void backward(const HeadChunk&, const bf16_t*, const float*, const ActiveRows&, const bf16_t*, float*,
              const SplitAccumulator&) {}

#endif

void check_exp_z(const Tensor& exp_z, const Tensor& panel_max, int64_t n, int64_t vocab) {
  const int64_t panels = ceil_div(vocab, kNR);
  check_matrix(panel_max, ScalarType::Float, panels, n, "panel_max");
  STD_TORCH_CHECK(exp_z.scalar_type() == ScalarType::BFloat16 && exp_z.dim() == 3 && exp_z.size(0) == panels &&
                      exp_z.size(1) == n && exp_z.size(2) == kNR && exp_z.is_contiguous(),
                  "pact_fast: exp_z must be contiguous bf16 [", panels, ", ", n, ", ", kNR, "]");
}

// x [n, D], weight [V, D] bf16; target [n] int64, temperature [n] fp32. Out: logprob, lse, entropy [n] fp32 and,
// both or neither, the inputs of bf16_softmax_grads: exp_z [panels of 64 columns, n, 64] bf16, panel_max [panels, n]
// fp32.
void bf16_softmax(const Tensor x, const Tensor weight, const Tensor target, const Tensor temperature,
                  std::optional<Tensor> exp_z, std::optional<Tensor> panel_max, Tensor logprob, Tensor lse,
                  Tensor entropy) {
  const HeadShape shape = check_shape(x, weight);
  const int64_t n = shape.rows;
  check_index(target, n, 0, shape.vocab, "target");
  check_vector(temperature, ScalarType::Float, n, "temperature");
  check_vector(logprob, ScalarType::Float, n, "logprob");
  check_vector(lse, ScalarType::Float, n, "lse");
  check_vector(entropy, ScalarType::Float, n, "entropy");
  STD_TORCH_CHECK(exp_z.has_value() == panel_max.has_value(), "pact_fast: exp_z and panel_max must be given together");
  if (exp_z) check_exp_z(*exp_z, *panel_max, n, shape.vocab);
  const HeadChunk chunk{data_ptr<bf16_t>(weight),  shape,
                        data_ptr<int64_t>(target), data_ptr<float>(temperature),
                        data_ptr<float>(logprob),  data_ptr<float>(lse),
                        data_ptr<float>(entropy)};
  forward(data_ptr<bf16_t>(x), chunk, data_ptr<bf16_t>(exp_z), data_ptr<float>(panel_max));
}

// Gradients of m ≤ 1024 of the n rows of a chunk: row source[j] of the chunk is row j of x and dx [m, D]. g =
// dL/dlogprob, target, temperature and the statistics are [n], by row of the chunk. Outputs as in bf16_grads.
void bf16_softmax_grads(const Tensor exp_z, const Tensor panel_max, const Tensor source, const Tensor target,
                        const Tensor temperature, const Tensor logprob, const Tensor lse, const Tensor g,
                        const Tensor x, const Tensor weight, std::optional<Tensor> dx, std::optional<Tensor> d_weight,
                        std::optional<Tensor> lo, bool add) {
  const HeadShape active = check_shape(x, weight);
  check_grads(active, dx, d_weight, lo);
  STD_TORCH_CHECK(target.dim() == 1, "pact_fast: target must be int64 [n]");
  const int64_t n = target.size(0);
  check_exp_z(exp_z, panel_max, n, active.vocab);
  check_index(target, n, 0, active.vocab, "target");
  check_index(source, active.rows, 0, n, "source");
  check_vector(temperature, ScalarType::Float, n, "temperature");
  check_vector(logprob, ScalarType::Float, n, "logprob");
  check_vector(lse, ScalarType::Float, n, "lse");
  check_vector(g, ScalarType::Float, n, "g");
  STD_TORCH_CHECK(active.rows <= kMaxRows, "pact_fast: at most ", kMaxRows, " rows at a time");
  if (active.rows == 0) return;
  const HeadChunk chunk{data_ptr<bf16_t>(weight),
                        {n, active.vocab, active.width},
                        data_ptr<int64_t>(target),
                        data_ptr<float>(temperature),
                        data_ptr<float>(logprob),
                        data_ptr<float>(lse),
                        nullptr};
  backward(chunk, data_ptr<bf16_t>(exp_z), data_ptr<float>(panel_max),
           {data_ptr<int64_t>(source), active.rows, data_ptr<float>(g)}, data_ptr<bf16_t>(x), data_ptr<float>(dx),
           {data_ptr<bf16_t>(d_weight), data_ptr<int8_t>(lo), active.width, add});
}

}  // namespace
}  // namespace pact_fast::head

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def(
      "bf16_softmax(Tensor x, Tensor weight, Tensor target, Tensor temperature, Tensor(a!)? exp_z, "
      "Tensor(b!)? panel_max, Tensor(c!) logprob, Tensor(d!) lse, Tensor(e!) entropy) -> ()");
  m.def(
      "bf16_softmax_grads(Tensor exp_z, Tensor panel_max, Tensor source, Tensor target, Tensor temperature, "
      "Tensor logprob, Tensor lse, Tensor g, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? d_weight, "
      "Tensor(c!)? lo, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("bf16_softmax", TORCH_BOX(&pact_fast::head::bf16_softmax));
  m.impl("bf16_softmax_grads", TORCH_BOX(&pact_fast::head::bf16_softmax_grads));
}
