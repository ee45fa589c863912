// The row pass of the fused head on CPU: everything between the GEMM that makes the logits and the two that use dZ.
//
// A chunk of logits z [n, V] (fp32) is read once by `head_rows_forward`, which leaves the final logits
//     z ← softcap·tanh((z + b)/softcap)/T
// in place and gives log-probs, entropies and log-sum-exps, and once by `head_rows_backward`, which replaces them by
//     dz = [g·(onehot − p) − h·p·(log p + H)]·(1 − (z·T/softcap)²)/T,      p = exp(z − lse).
// One thread owns a row and adds in a fixed order, so that results do not depend on the number of threads.
//
// LibTorch stable ABI: one build serves every torch from 2.11 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

using torch::stable::Tensor;

namespace {

constexpr int64_t kBlock = 2048;  // logits worked on at a time: 8 KiB, read again from the first-level cache

// exp(x) for x ≤ 88 within 2 ulp; below −87.3 it gives 0. Branch-free, so that compilers vectorise loops around it.
inline float exp_fast(float x) {
  const float bounded = std::max(x, -87.0f);
  const float n = std::nearbyintf(bounded * 1.44269504088896341f);
  const float r = std::fmaf(n, 1.42860682030941723e-6f, std::fmaf(n, -0.693145751953125f, bounded));  // x − n·ln 2
  float y = 1.9875691500e-4f;
  y = std::fmaf(y, r, 1.3981999507e-3f);
  y = std::fmaf(y, r, 8.3334519073e-3f);
  y = std::fmaf(y, r, 4.1665795894e-2f);
  y = std::fmaf(y, r, 1.6666665459e-1f);
  y = std::fmaf(y, r, 5.0000001201e-1f);
  y = std::fmaf(y * r, r, r) + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : y * power;
}

// tanh(x) within 3 ulp.
inline float tanh_fast(float x) {
  const float a = std::min(std::fabs(x), 10.0f);
  const float wide = 1.0f - 2.0f / (exp_fast(2.0f * a) + 1.0f);
  const float s = a * a;  // Taylor series where the quotient would cancel
  const float narrow = a * (1.0f + s * (-3.33333333e-1f + s * (1.33333333e-1f + s * (-5.39682540e-2f + s * 2.18694885e-2f))));
  return std::copysign(a < 0.25f ? narrow : wide, x);
}

struct Row {
  float target, lse, entropy;  // target: the target's logit
};

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
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < n; ++i) top = std::max(top, z[i]);
  return top;
}

// One read of the row: online maximum m, Σ exp(z − m) and Σ exp(z − m)·(z − m). Sums over blocks are fp64.
Row row_forward(float* z, const float* bias, int64_t vocab, int64_t target, float softcap, float inverse_temperature) {
  float m = -std::numeric_limits<float>::infinity();
  double sum = 0.0, weighted = 0.0;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = std::min(kBlock, vocab - start);
    float* block = z + start;
    const float top = finish_logits(block, bias == nullptr ? nullptr : bias + start, n, softcap, inverse_temperature);
    if (top > m) {
      const double shift = static_cast<double>(m) - top, scale = std::exp(shift);
      // Σ e^(z−m')·(z−m') with m' = top; the first block has nothing to scale
      weighted = sum > 0.0 ? scale * (weighted + shift * sum) : 0.0;
      sum *= scale;
      m = top;
    }
    float s = 0.0f, w = 0.0f;
#pragma omp simd reduction(+ : s, w)
    for (int64_t i = 0; i < n; ++i) {
      const float d = block[i] - m, e = exp_fast(d);
      s += e;
      w += e * d;
    }
    sum += s;
    weighted += w;
  }
  const double log_sum = std::log(sum);
  return {z[target], static_cast<float>(m + log_sum), static_cast<float>(log_sum - weighted / sum)};
}

// dz of one row from its final logits; `out` may be `z`.
void row_backward(const float* z, float* out, int64_t vocab, int64_t target, float lse, float entropy, float g, float h,
                  float softcap, float temperature) {
  const float inverse = 1.0f / temperature, to_tanh = softcap > 0.0f ? temperature / softcap : 0.0f;
  const float log_p = z[target] - lse;
  const float slope = 1.0f - (z[target] * to_tanh) * (z[target] * to_tanh);
  // 1 − p by expm1: where p → 1, g − g·p would lose every digit
  const float at_target = (-g * std::expm1(log_p) - h * std::exp(log_p) * (log_p + entropy)) * inverse * slope;
  const float gt = g * inverse, ht = h * inverse;
  if (ht == 0.0f && softcap <= 0.0f) {
    for (int64_t i = 0; i < vocab; ++i) out[i] = -gt * exp_fast(z[i] - lse);
  } else {
    for (int64_t i = 0; i < vocab; ++i) {
      const float l = z[i] - lse, t = z[i] * to_tanh;
      out[i] = -exp_fast(l) * (gt + ht * (l + entropy)) * (1.0f - t * t);
    }
  }
  out[target] = at_target;
}

template <typename T>
T* data(const Tensor& t) {
  return reinterpret_cast<T*>(t.data_ptr());
}

template <typename T>
T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

// A row is some microseconds of work: enough for a thread to start on.
constexpr int64_t grain(int64_t vocab) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(vocab, 1)); }

}  // namespace

// z [n, V] fp32, rows contiguous, changed in place; target [n] int64; bias [V], temperature [n] fp32;
// out: logprob, lse, entropy [n] fp32. softcap 0: none.
void head_rows_forward(Tensor z, const Tensor target, const std::optional<Tensor> bias, const Tensor temperature,
                       double softcap, Tensor logprob, Tensor lse, Tensor entropy) {
  const int64_t rows = z.size(0), vocab = z.size(1), stride = z.stride(0);
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row row = row_forward(data<float>(z) + i * stride, data<float>(bias), vocab, data<int64_t>(target)[i],
                                  static_cast<float>(softcap), 1.0f / data<float>(temperature)[i]);
      data<float>(logprob)[i] = row.target - row.lse;
      data<float>(lse)[i] = row.lse;
      data<float>(entropy)[i] = row.entropy;
    }
  });
}

// Row j of z becomes dz of row source[j] (m ≤ n rows). A row that moves goes to a place whose own row is not among the
// sources, so rows can be worked on in any order. lse, entropy, g, h, target, temperature: [n], by source row.
void head_rows_backward(Tensor z, const Tensor source, const Tensor target, const Tensor temperature, double softcap,
                        const Tensor lse, const Tensor entropy, const Tensor g, const std::optional<Tensor> h) {
  const int64_t rows = source.size(0), vocab = z.size(1), stride = z.stride(0);
  const float* h_data = data<float>(h);
  torch::stable::parallel_for(0, rows, grain(vocab), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      const int64_t i = data<int64_t>(source)[j];
      row_backward(data<float>(z) + i * stride, data<float>(z) + j * stride, vocab, data<int64_t>(target)[i],
                   data<float>(lse)[i], data<float>(entropy)[i], data<float>(g)[i], h_data == nullptr ? 0.0f : h_data[i],
                   static_cast<float>(softcap), data<float>(temperature)[i]);
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def(
      "head_rows_forward(Tensor(a!) z, Tensor target, Tensor? bias, Tensor temperature, float softcap, "
      "Tensor(b!) logprob, Tensor(c!) lse, Tensor(d!) entropy) -> ()");
  m.def(
      "head_rows_backward(Tensor(a!) z, Tensor source, Tensor target, Tensor temperature, float softcap, Tensor lse, "
      "Tensor entropy, Tensor g, Tensor? h) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("head_rows_forward", TORCH_BOX(&head_rows_forward));
  m.impl("head_rows_backward", TORCH_BOX(&head_rows_backward));
}
