// The softmax passes of the fused head on CPU, fp32: everything between the GEMM that makes the logits and the two
// GEMMs that read dZ.
//
// head_softmax_forward reads a chunk of logits z [n, V] once. It leaves the final logits
//     z ← softcap·tanh((z + b)/softcap)/T
// in place and computes log-prob, log-sum-exp and entropy of each row. head_softmax_backward reads them once and
// replaces them by
//     dz = [g·(onehot − p) − h·p·(log p + H) + pair]·(1 − (z·T/softcap)²)/T,      p = exp(z − lse),
// where `pair` is the gradient of a divergence between the softmax of this row and that of its partner. Formulas
// and shapes: pact_fast/kernels/head/softmax_torch.py, the reference in plain torch. One thread owns a row and adds in a
// fixed order: results do not depend on the number of threads.
//
// LibTorch stable ABI: one build serves every torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "common/exp.h"
#include "common/tensor.h"

namespace pact_fast {
namespace {

constexpr int64_t kBlock = 2048;  // logits per block: 8 KiB, read again from L1

// log(1 + u) for 0 ≤ u ≤ 1 as 2·artanh(u/(2 + u)).
inline float log1p_fast(float u) {
  const float s = u / (2.0f + u), q = s * s;
  float y = std::fmaf(1.0f / 13.0f, q, 1.0f / 11.0f);
  y = std::fmaf(y, q, 1.0f / 9.0f);
  y = std::fmaf(y, q, 1.0f / 7.0f);
  y = std::fmaf(y, q, 1.0f / 5.0f);
  y = std::fmaf(y, q, 1.0f / 3.0f);
  y = std::fmaf(y, q, 1.0f);
  return 2.0f * s * y;
}

// tanh(x) within 3 ulp.
inline float tanh_fast(float x) {
  const float a = std::min(std::fabs(x), 10.0f);
  const float quotient = 1.0f - 2.0f / (exp_fast(2.0f * a) + 1.0f);
  const float s = a * a;  // Taylor series where the quotient would cancel
  const float series =
      a * (1.0f + s * (-3.33333333e-1f + s * (1.33333333e-1f + s * (-5.39682540e-2f + s * 2.18694885e-2f))));
  return std::copysign(a < 0.25f ? series : quotient, x);
}

// Terms of one fp32 sum; partial sums are added up in fp64. Where one term is nearly everything (p → 1), only the
// terms of its own partial sum lose digits to it.
constexpr int64_t kPartialSum = 128;

struct RowStats {
  float logprob, lse, entropy;
};

// Lane by lane: because of NaN, compilers do not vectorise a plain maximum over floats.
float block_max(const float* z, int64_t n) {
  constexpr int kLanes = 16;
  float max[kLanes];
  std::fill_n(max, kLanes, std::numeric_limits<float>::lowest());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) max[j] = std::max(max[j], z[i + j]);
  }
  for (; i < n; ++i) max[0] = std::max(max[0], z[i]);
  return *std::max_element(max, max + kLanes);
}

// Applies bias, soft-cap and temperature to a block in place; returns the maximum of the final logits.
float finish_logits(float* z, const float* bias, int64_t n, float softcap, float inverse_temperature) {
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) z[i] += bias[i];
  }
  if (softcap > 0.0f) {
    const float inverse = 1.0f / softcap;
    for (int64_t i = 0; i < n; ++i) z[i] = softcap * tanh_fast(z[i] * inverse);
  }
  if (inverse_temperature != 1.0f) {
    for (int64_t i = 0; i < n; ++i) z[i] *= inverse_temperature;
  }
  return block_max(z, n);
}

// Online softmax: running maximum m, Σ exp(z − m) and Σ exp(z − m)·(z − m) in one read of the row. Sums over blocks are
// fp64.
RowStats row_forward(float* z, const float* bias, int64_t vocab, int64_t target, float softcap,
                     float inverse_temperature) {
  float m = std::numeric_limits<float>::lowest();
  double sum = 0.0, weighted = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    float* block = z + start;
    const float max = finish_logits(block, bias == nullptr ? nullptr : bias + start, n, softcap, inverse_temperature);
    if (max > m) {
      const double shift = static_cast<double>(m) - max, scale = std::exp(shift);
      weighted = scale * (weighted + shift * sum);  // rescales both sums to the new maximum
      sum *= scale;
      m = max;
    }
    for (int64_t from = 0; from < n; from += kPartialSum) {
      const int64_t to = std::min(n, from + kPartialSum);
      float partial_sum = 0.0f, partial_weighted = 0.0f;
#pragma omp simd reduction(+ : partial_sum, partial_weighted)
      for (int64_t i = from; i < to; ++i) {
        const float d = block[i] - m, e = exp_fast(d);
        partial_sum += e;
        partial_weighted += e * d;
      }
      sum += partial_sum;
      weighted += partial_weighted;
    }
  }
  const double log_sum = std::log(sum);
  // not z − lse: where p → 1 the rounded lse would be all that is left
  const double logprob = static_cast<double>(z[target]) - m - log_sum;
  return {static_cast<float>(logprob), static_cast<float>(m + log_sum), static_cast<float>(log_sum - weighted / sum)};
}

// log((p + q)/2) from log p and log q.
inline float log_mean(float a, float b) {
  const float high = std::max(a, b), low = std::min(a, b);
  return high + log1p_fast(exp_fast(low - high)) - 0.693147180559945f;
}

template <bool jsd>
inline float reference_logprob(float log_p, float log_q) {
  if constexpr (jsd) return log_mean(log_p, log_q);
  return log_q;
}

// KL(p ‖ q) in nats or, if `jsd`, KL(p ‖ (p + q)/2), where p and q are the softmax of two rows of final logits.
// Divided by Σp, which the rounding of lse takes off 1.
template <bool jsd>
double row_divergence(const float* z, const float* other, int64_t vocab, float lse, float other_lse) {
  double total = 0.0, mass = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t stop = std::min(vocab, start + kBlock);
    float block_total = 0.0f, block_mass = 0.0f;
#pragma omp simd reduction(+ : block_total, block_mass)
    for (int64_t i = start; i < stop; ++i) {
      const float l = z[i] - lse, k = other[i] - other_lse, p = exp_fast(l);
      block_total += p * (l - reference_logprob<jsd>(l, k));
      block_mass += p;
    }
    total += block_total;
    mass += block_mass;
  }
  return total / mass;
}

// The row that this one is coupled to by a divergence; q is its softmax.
struct Partner {
  const float* z;  // final logits; nullptr: no partner
  float lse, divergence;
  float own, cross;  // dL/dKL(p ‖ q) (if `jsd`: dL/dKL(p ‖ (p + q)/2)) and dL/dKL(q ‖ p)
  bool jsd;
};

// The scalars that a row's gradient is made from. g, h: dL/dlogprob and dL/dentropy.
struct RowGrad {
  int64_t target;
  float logprob, lse, entropy, g, h, softcap, temperature;
  Partner partner;
};

// The factor of p in dz, except for g. log_p and log_q: log-probs of the row and of its partner. Without a partner,
// own and cross are 0.
template <bool jsd>
inline float softmax_factor(float log_p, float log_q, const RowGrad& r) {
  const float centred = log_p - reference_logprob<jsd>(log_p, log_q) - r.partner.divergence;
  return r.partner.own * centred + r.partner.cross - r.h * (log_p + r.entropy);
}

template <bool jsd>
void coupled_block(const float* z, const float* partner_z, float* out, int64_t n, const RowGrad& r) {
  for (int64_t i = 0; i < n; ++i) {
    const float l = z[i] - r.lse, k = partner_z[i] - r.partner.lse;
    out[i] = exp_fast(l) * (softmax_factor<jsd>(l, k, r) - r.g) - r.partner.cross * exp_fast(k);
  }
}

// dz of the n ≤ kBlock logits z that begin at column `start`.
void block_backward(const float* z, float* out, int64_t start, int64_t n, const RowGrad& r) {
  const float* partner_z = r.partner.z == nullptr ? nullptr : r.partner.z + start;
  if (partner_z != nullptr) {
    (r.partner.jsd ? coupled_block<true> : coupled_block<false>)(z, partner_z, out, n, r);
  } else if (r.h != 0.0f) {
    const float g = r.g, h = r.h, lse = r.lse, entropy = r.entropy;  // copies, which `out` cannot alias
    for (int64_t i = 0; i < n; ++i) {
      const float l = z[i] - lse;
      out[i] = -exp_fast(l) * (g + h * (l + entropy));
    }
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = -r.g * exp_fast(z[i] - r.lse);
  }
  if (r.target >= start && r.target < start + n) {
    // 1 − p by expm1: where p → 1, g − g·p would lose every digit
    const float l = r.logprob, k = partner_z == nullptr ? l : partner_z[r.target - start] - r.partner.lse;
    const float factor = r.partner.jsd ? softmax_factor<true>(l, k, r) : softmax_factor<false>(l, k, r);
    const float without_g = std::exp(l) * factor - r.partner.cross * std::exp(k);
    out[r.target - start] = without_g - r.g * std::expm1(l);
  }
  const float inverse_temperature = 1.0f / r.temperature;
  if (r.softcap > 0.0f) {
    const float to_tanh = r.temperature / r.softcap;
    for (int64_t i = 0; i < n; ++i) out[i] *= inverse_temperature * (1.0f - (z[i] * to_tanh) * (z[i] * to_tanh));
  } else if (inverse_temperature != 1.0f) {
    for (int64_t i = 0; i < n; ++i) out[i] *= inverse_temperature;
  }
}

// dz of one row from its final logits z; `out` may be z if there is no partner.
void row_backward(const float* z, float* out, int64_t vocab, const RowGrad& r) {
  float block[kBlock];  // a copy: `out` overwrites z, which the slope of the soft-cap still needs
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    std::copy_n(z + start, n, block);
    block_backward(block, out + start, start, n, r);
  }
}

// fp32 logits [n, V] with contiguous rows.
void check_logits(const Tensor& z, const char* name) {
  STD_TORCH_CHECK(z.dim() == 2, "pact_fast: ", name, " must be fp32 [n, V]");
  check_rows(z, ScalarType::Float, z.size(0), z.size(1), name);
}

// Rows per task of torch's pool. A row of a large vocabulary takes microseconds: enough for a task.
constexpr int64_t grain(int64_t vocab) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(vocab, 1)); }

// z [n, V] fp32 with contiguous rows, changed in place; target [n] int64; bias [V], temperature [n] fp32; softcap
// 0: none. Out: logprob, lse, entropy [n] fp32.
void head_softmax_forward(Tensor z, const Tensor target, const std::optional<Tensor> bias, const Tensor temperature,
                          double softcap, Tensor logprob, Tensor lse, Tensor entropy) {
  check_logits(z, "z");
  const int64_t rows = z.size(0), vocab = z.size(1), stride = z.stride(0);
  check_index(target, rows, 0, vocab, "target");
  check_vector(bias, ScalarType::Float, vocab, "bias");
  check_vector(temperature, ScalarType::Float, rows, "temperature");
  check_vector(logprob, ScalarType::Float, rows, "logprob");
  check_vector(lse, ScalarType::Float, rows, "lse");
  check_vector(entropy, ScalarType::Float, rows, "entropy");
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const RowStats stats =
          row_forward(data_ptr<float>(z) + i * stride, data_ptr<float>(bias), vocab, data_ptr<int64_t>(target)[i],
                      static_cast<float>(softcap), 1.0f / data_ptr<float>(temperature)[i]);
      data_ptr<float>(logprob)[i] = stats.logprob;
      data_ptr<float>(lse)[i] = stats.lse;
      data_ptr<float>(entropy)[i] = stats.entropy;
    }
  });
}

// result [n] ← the divergence of every row from its partner, 0 where partner is −1. z, lse: as head_softmax_forward
// leaves them. jsd: KL to the mean of both distributions.
void head_softmax_divergence(const Tensor z, const Tensor lse, const Tensor partner, bool jsd, Tensor result) {
  check_logits(z, "z");
  const int64_t rows = z.size(0), vocab = z.size(1), stride = z.stride(0);
  check_vector(lse, ScalarType::Float, rows, "lse");
  check_index(partner, rows, -1, rows, "partner");
  check_vector(result, ScalarType::Float, rows, "result");
  const float* lses = data_ptr<float>(lse);
  const auto divergence = jsd ? row_divergence<true> : row_divergence<false>;
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = data_ptr<int64_t>(partner)[i];
      const float *own = data_ptr<float>(z) + i * stride, *other = data_ptr<float>(z) + k * stride;
      data_ptr<float>(result)[i] = k < 0 ? 0.0f : static_cast<float>(divergence(own, other, vocab, lses[i], lses[k]));
    }
  });
}

// Row j of out [≥ m, V] ← dz of row source[j] of z [n, V], j < m. `out` may be z if no row has a partner and every
// row that moves goes to a place whose own row is not among the sources (rows_torch.compact): rows can then be
// processed in any order. The other tensors are [n], by row of z; h may be missing, and so may partner, divergence,
// own and cross together.
void head_softmax_backward(Tensor z, Tensor out, const Tensor source, const Tensor target, const Tensor temperature,
                           double softcap, const Tensor logprob, const Tensor lse, const Tensor entropy, const Tensor g,
                           const std::optional<Tensor> h, const std::optional<Tensor> partner,
                           const std::optional<Tensor> divergence, const std::optional<Tensor> own,
                           const std::optional<Tensor> cross, bool jsd) {
  check_logits(z, "z");
  check_logits(out, "out");
  STD_TORCH_CHECK(source.dim() == 1, "pact_fast: source must be int64 [m]");
  const int64_t n = z.size(0), vocab = z.size(1), m = source.size(0), stride = z.stride(0), out_stride = out.stride(0);
  STD_TORCH_CHECK(out.size(0) >= m && out.size(1) == vocab, "pact_fast: out must have at least ", m, " rows of ",
                  vocab);
  check_index(source, m, 0, n, "source");
  check_index(target, n, 0, vocab, "target");
  STD_TORCH_CHECK(partner.has_value() == divergence.has_value() && partner.has_value() == own.has_value() &&
                      partner.has_value() == cross.has_value(),
                  "pact_fast: partner, divergence, own and cross must be given together");
  if (partner) check_index(*partner, n, -1, n, "partner");
  check_vector(temperature, ScalarType::Float, n, "temperature");
  check_vector(logprob, ScalarType::Float, n, "logprob");
  check_vector(lse, ScalarType::Float, n, "lse");
  check_vector(entropy, ScalarType::Float, n, "entropy");
  check_vector(g, ScalarType::Float, n, "g");
  check_vector(h, ScalarType::Float, n, "h");
  check_vector(divergence, ScalarType::Float, n, "divergence");
  check_vector(own, ScalarType::Float, n, "own");
  check_vector(cross, ScalarType::Float, n, "cross");
  const float *base = data_ptr<float>(z), *lses = data_ptr<float>(lse), *hs = data_ptr<float>(h);
  const int64_t* partners = data_ptr<int64_t>(partner);
  torch::stable::parallel_for(0, m, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = data_ptr<int64_t>(source)[j], k = partners == nullptr ? -1 : partners[i];
      Partner other{};
      if (k >= 0) {
        other = {base + k * stride,         lses[k], data_ptr<float>(divergence)[i], data_ptr<float>(own)[i],
                 data_ptr<float>(cross)[i], jsd};
      }
      const RowGrad row{data_ptr<int64_t>(target)[i], data_ptr<float>(logprob)[i],     lses[i],
                        data_ptr<float>(entropy)[i],  data_ptr<float>(g)[i],           hs == nullptr ? 0.0f : hs[i],
                        static_cast<float>(softcap),  data_ptr<float>(temperature)[i], other};
      row_backward(base + i * stride, data_ptr<float>(out) + j * out_stride, vocab, row);
    }
  });
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def(
      "head_softmax_forward(Tensor(a!) z, Tensor target, Tensor? bias, Tensor temperature, float softcap, "
      "Tensor(b!) logprob, Tensor(c!) lse, Tensor(d!) entropy) -> ()");
  m.def("head_softmax_divergence(Tensor z, Tensor lse, Tensor partner, bool jsd, Tensor(a!) result) -> ()");
  m.def(
      "head_softmax_backward(Tensor(a!) z, Tensor(b!) out, Tensor source, Tensor target, Tensor temperature, "
      "float softcap, Tensor logprob, Tensor lse, Tensor entropy, Tensor g, Tensor? h, Tensor? partner, "
      "Tensor? divergence, Tensor? own, Tensor? cross, bool jsd) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("head_softmax_forward", TORCH_BOX(&pact_fast::head_softmax_forward));
  m.impl("head_softmax_divergence", TORCH_BOX(&pact_fast::head_softmax_divergence));
  m.impl("head_softmax_backward", TORCH_BOX(&pact_fast::head_softmax_backward));
}
