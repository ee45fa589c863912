// The row pass of the fused head on CPU: everything between the GEMM that makes the logits and the two that use dZ.
//
// A chunk of logits z [n, V] (fp32) is read once by `head_rows_forward`, which leaves the final logits
//     z ← softcap·tanh((z + b)/softcap)/T
// in place and gives log-probs, entropies and log-sum-exps, and once by `head_rows_backward`, which replaces them by
//     dz = [g·(onehot − p) − h·p·(log p + H) + pair]·(1 − (z·T/softcap)²)/T,      p = exp(z − lse),
// where `pair` is the gradient of a divergence between this row's softmax and another one's. Formulas and shapes:
// pact_fast/kernels/rows_torch.py, the twin in plain torch.
// One thread owns a row and adds in a fixed order, so that results do not depend on the number of threads.
//
// LibTorch stable ABI: one build serves every torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

#include "exp.h"

using torch::stable::Tensor;

namespace {

using pact_fast::exp_fast;

constexpr int64_t kBlock = 2048;  // logits worked on at a time: 8 KiB, read again from the first-level cache

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
  const float wide = 1.0f - 2.0f / (exp_fast(2.0f * a) + 1.0f);
  const float s = a * a;  // Taylor series where the quotient would cancel
  const float narrow = a * (1.0f + s * (-3.33333333e-1f + s * (1.33333333e-1f + s * (-5.39682540e-2f + s * 2.18694885e-2f))));
  return std::copysign(a < 0.25f ? narrow : wide, x);
}

// Terms that are added up in fp32 before fp64 takes over: where one term is nearly everything (p → 1), only these lose
// digits to it.
constexpr int64_t kPart = 128;

struct Row {
  float logprob, lse, entropy;
};

// Lane by lane: compilers do not vectorise a maximum over floats as such, because of NaN.
float largest(const float* z, int64_t n) {
  constexpr int kLanes = 16;
  float top[kLanes];
  std::fill_n(top, kLanes, std::numeric_limits<float>::lowest());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) top[j] = std::max(top[j], z[i + j]);
  }
  for (; i < n; ++i) top[0] = std::max(top[0], z[i]);
  return *std::max_element(top, top + kLanes);
}

// Final logits of one block in place; returns their maximum.
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
  return largest(z, n);
}

// One read of the row: online maximum m, Σ exp(z − m) and Σ exp(z − m)·(z − m). Sums over blocks are fp64.
Row row_forward(float* z, const float* bias, int64_t vocab, int64_t target, float softcap, float inverse_temperature) {
  float m = std::numeric_limits<float>::lowest();
  double sum = 0.0, weighted = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    float* block = z + start;
    const float top = finish_logits(block, bias == nullptr ? nullptr : bias + start, n, softcap, inverse_temperature);
    if (top > m) {
      const double shift = static_cast<double>(m) - top, scale = std::exp(shift);
      weighted = scale * (weighted + shift * sum);  // both sums move to the new maximum
      sum *= scale;
      m = top;
    }
    for (int64_t from = 0; from < n; from += kPart) {
      const int64_t to = std::min(n, from + kPart);
      float s = 0.0f, w = 0.0f;
#pragma omp simd reduction(+ : s, w)
      for (int64_t i = from; i < to; ++i) {
        const float d = block[i] - m, e = exp_fast(d);
        s += e;
        w += e * d;
      }
      sum += s;
      weighted += w;
    }
  }
  const double log_sum = std::log(sum);
  // not z − lse: where p → 1 the rounded lse would be all that is left
  const double logprob = static_cast<double>(z[target]) - m - log_sum;
  return {static_cast<float>(logprob), static_cast<float>(m + log_sum), static_cast<float>(log_sum - weighted / sum)};
}

// log((p + q)/2) from log p and log q.
inline float log_mean(float a, float b) {
  const float top = std::max(a, b), low = std::min(a, b);
  return top + log1p_fast(exp_fast(low - top)) - 0.693147180559945f;
}

template <bool to_mean>
inline float reference(float log_p, float log_q) {
  if constexpr (to_mean) return log_mean(log_p, log_q);
  return log_q;
}

// KL(p ‖ q) in nats, or KL(p ‖ (p + q)/2) if `to_mean`, of the softmax of two rows of final logits. Divided by Σp, which
// is not quite 1 after lse was rounded.
template <bool to_mean>
double row_divergence(const float* z, const float* other, int64_t vocab, float lse, float other_lse) {
  double total = 0.0, mass = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t stop = std::min(vocab, start + kBlock);
    float part = 0.0f, weight = 0.0f;
#pragma omp simd reduction(+ : part, weight)
    for (int64_t i = start; i < stop; ++i) {
      const float l = z[i] - lse, k = other[i] - other_lse, p = exp_fast(l);
      part += p * (l - reference<to_mean>(l, k));
      weight += p;
    }
    total += part;
    mass += weight;
  }
  return total / mass;
}

struct Pair {
  const float* other;  // final logits of the partner; nullptr: none
  float lse, divergence, own, cross;
  bool to_mean;
};

// What one row's gradient is made of.
struct RowGrad {
  int64_t target;
  float logprob, lse, entropy, g, h, softcap, temperature;
  Pair pair;
};

// What multiplies p in dz, but for g; `other` is the partner's log-prob. Without a pair own and cross are 0.
template <bool to_mean>
inline float softmax_factor(float l, float other, const RowGrad& r) {
  const float leaning = l - reference<to_mean>(l, other) - r.pair.divergence;
  return r.pair.own * leaning + r.pair.cross - r.h * (l + r.entropy);
}

template <bool to_mean>
void paired_block(const float* z, const float* other, float* out, int64_t n, const RowGrad& r) {
  for (int64_t i = 0; i < n; ++i) {
    const float l = z[i] - r.lse, k = other[i] - r.pair.lse;
    out[i] = exp_fast(l) * (softmax_factor<to_mean>(l, k, r) - r.g) - r.pair.cross * exp_fast(k);
  }
}

// dz of n ≤ kBlock logits z that begin at `start` of the row.
void block_backward(const float* z, float* out, int64_t start, int64_t n, const RowGrad& r) {
  const float* other = r.pair.other == nullptr ? nullptr : r.pair.other + start;
  if (other != nullptr) {
    (r.pair.to_mean ? paired_block<true> : paired_block<false>)(z, other, out, n, r);
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
    const float l = r.logprob, k = other == nullptr ? l : other[r.target - start] - r.pair.lse;
    const float factor = r.pair.to_mean ? softmax_factor<true>(l, k, r) : softmax_factor<false>(l, k, r);
    const float rest = std::exp(l) * factor - r.pair.cross * std::exp(k);
    out[r.target - start] = rest - r.g * std::expm1(l);
  }
  const float inverse = 1.0f / r.temperature;
  if (r.softcap > 0.0f) {
    const float to_tanh = r.temperature / r.softcap;
    for (int64_t i = 0; i < n; ++i) out[i] *= inverse * (1.0f - (z[i] * to_tanh) * (z[i] * to_tanh));
  } else if (inverse != 1.0f) {
    for (int64_t i = 0; i < n; ++i) out[i] *= inverse;
  }
}

// dz of one row from its final logits z; `out` may be z if there is no partner.
void row_backward(const float* z, float* out, int64_t vocab, const RowGrad& r) {
  float block[kBlock];  // a copy, for `out` overwrites z while the slope of the soft-cap still needs it
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    std::copy_n(z + start, n, block);
    block_backward(block, out + start, start, n, r);
  }
}

template <typename T>
T* data(const Tensor& t) {
  return reinterpret_cast<T*>(t.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

using torch::headeronly::ScalarType;

// Rows of logits: fp32 and contiguous by themselves.
void check_logits(const Tensor& z) {
  STD_TORCH_CHECK(z.dim() == 2 && z.scalar_type() == ScalarType::Float && (z.size(1) == 0 || z.stride(1) == 1),
                  "head rows: logits must be fp32 [n, V] with contiguous rows");
}

// One entry for each of n rows, one after the other.
void check_vector(const std::optional<Tensor>& t, int64_t n, ScalarType type, const char* name) {
  STD_TORCH_CHECK(!t.has_value() || (t->dim() == 1 && t->size(0) == n && t->scalar_type() == type && t->is_contiguous()),
                  "head rows: ", name, " must be a contiguous [", n, "] of ",
                  type == ScalarType::Long ? "int64" : "fp32");
}

// A row is some microseconds of work: enough for a thread to start on.
constexpr int64_t grain(int64_t vocab) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(vocab, 1)); }

}  // namespace

// z [n, V] fp32, rows contiguous, changed in place; target [n] int64; bias [V], temperature [n] fp32;
// out: logprob, lse, entropy [n] fp32. softcap 0: none.
void head_rows_forward(Tensor z, const Tensor target, const std::optional<Tensor> bias, const Tensor temperature,
                       double softcap, Tensor logprob, Tensor lse, Tensor entropy) {
  check_logits(z);
  const int64_t rows = z.size(0), vocab = z.size(1), stride = z.stride(0);
  check_vector(target, rows, ScalarType::Long, "target");
  check_vector(bias, vocab, ScalarType::Float, "bias");
  check_vector(temperature, rows, ScalarType::Float, "temperature");
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row row = row_forward(data<float>(z) + i * stride, data<float>(bias), vocab, data<int64_t>(target)[i],
                                  static_cast<float>(softcap), 1.0f / data<float>(temperature)[i]);
      data<float>(logprob)[i] = row.logprob;
      data<float>(lse)[i] = row.lse;
      data<float>(entropy)[i] = row.entropy;
    }
  });
}

// [n] ← divergence of every row to its partner; 0 where partner is −1.
void head_rows_divergence(const Tensor z, const Tensor lse, const Tensor partner, bool to_mean, Tensor result) {
  check_logits(z);
  const int64_t rows = z.size(0), vocab = z.size(1), stride = z.stride(0);
  check_vector(lse, rows, ScalarType::Float, "lse");
  check_vector(partner, rows, ScalarType::Long, "partner");
  const float* lses = data<float>(lse);
  const auto divergence = to_mean ? row_divergence<true> : row_divergence<false>;
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = data<int64_t>(partner)[i];
      const float *own = data<float>(z) + i * stride, *other = data<float>(z) + k * stride;
      data<float>(result)[i] =
          k < 0 ? 0.0f : static_cast<float>(divergence(own, other, vocab, lses[i], lses[k]));
    }
  });
}

// Row j of out becomes dz of row source[j] of z (m ≤ n rows), both fp32 [·, V]. `out` may be z if no row has a partner
// and every row that moves goes to a place whose own row is not among the sources (rows_torch.compact): then rows can be
// worked on in any order. The other tensors are [n], by row of z; h and the pairing may be missing.
void head_rows_backward(Tensor z, Tensor out, const Tensor source, const Tensor target, const Tensor temperature,
                        double softcap, const Tensor logprob, const Tensor lse, const Tensor entropy, const Tensor g,
                        const std::optional<Tensor> h, const std::optional<Tensor> partner,
                        const std::optional<Tensor> divergence, const std::optional<Tensor> own,
                        const std::optional<Tensor> cross, bool to_mean) {
  check_logits(z);
  check_logits(out);
  const int64_t rows = source.size(0), vocab = z.size(1), stride = z.stride(0), out_stride = out.stride(0);
  STD_TORCH_CHECK(out.size(0) >= rows && out.size(1) == vocab, "head rows: out is too small");
  check_vector(source, rows, ScalarType::Long, "source");
  check_vector(target, z.size(0), ScalarType::Long, "target");
  check_vector(partner, z.size(0), ScalarType::Long, "partner");
  for (const auto& t : {std::optional(temperature), std::optional(logprob), std::optional(lse), std::optional(entropy),
                        std::optional(g), h, divergence, own, cross}) {
    check_vector(t, z.size(0), ScalarType::Float, "a vector by row");
  }
  const float *base = data<float>(z), *lses = data<float>(lse), *hs = data<float>(h);
  const int64_t* partners = data<int64_t>(partner);
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = data<int64_t>(source)[j], k = partners == nullptr ? -1 : partners[i];
      Pair pair{};
      if (k >= 0) {
        pair = {base + k * stride, lses[k], data<float>(divergence)[i], data<float>(own)[i], data<float>(cross)[i], to_mean};
      }
      const RowGrad row{data<int64_t>(target)[i], data<float>(logprob)[i], lses[i],
                        data<float>(entropy)[i],  data<float>(g)[i],       hs == nullptr ? 0.0f : hs[i],
                        static_cast<float>(softcap), data<float>(temperature)[i], pair};
      row_backward(base + i * stride, data<float>(out) + j * out_stride, vocab, row);
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def(
      "head_rows_forward(Tensor(a!) z, Tensor target, Tensor? bias, Tensor temperature, float softcap, "
      "Tensor(b!) logprob, Tensor(c!) lse, Tensor(d!) entropy) -> ()");
  m.def("head_rows_divergence(Tensor z, Tensor lse, Tensor partner, bool to_mean, Tensor(a!) result) -> ()");
  m.def(
      "head_rows_backward(Tensor(a!) z, Tensor(b!) out, Tensor source, Tensor target, Tensor temperature, float softcap, "
      "Tensor logprob, Tensor lse, Tensor entropy, Tensor g, Tensor? h, Tensor? partner, Tensor? divergence, Tensor? own, "
      "Tensor? cross, bool to_mean) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("head_rows_forward", TORCH_BOX(&head_rows_forward));
  m.impl("head_rows_divergence", TORCH_BOX(&head_rows_divergence));
  m.impl("head_rows_backward", TORCH_BOX(&head_rows_backward));
}
