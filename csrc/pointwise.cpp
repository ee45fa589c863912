// The pointwise steps of a decoder layer on CPU, each in one pass over memory: RMSNorm, the gated unit silu(gate)·up, and
// rotary embeddings.
//
// As a chain of torch's operators a norm in bf16 reads or writes its rows eleven times, most of them in fp32 and to memory
// that the system has to give out first. Forward, the roundings are those of the chain, so that both give nearly always
// the same bits; backward, everything is fp32 until it is stored.
//
//     norm       y = x·r, r = 1/√(mean(x²) + eps), out = w·y      dx = r·(g∘w − y·mean(g∘w∘y)),  dw = Σ g∘y  over rows
//     unit       out = silu(a)·u, silu(a) = a·σ(a)                da = g·u·σ(a)·(1 + a·(1 − σ(a))),  du = g·silu(a)
//     rotary     out = x∘cos + (−x₂, x₁)∘sin, x = (x₁, x₂)        dx = g∘cos + (h₂, −h₁), h = g∘sin
//
// Work is cut by rows or numbers and not by threads, so that results do not depend on how many there are.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <optional>

#include "attention_views.h"
#include "exp.h"
#include "work.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using pact_fast::ceil_div;
using pact_fast::share;
using pact_fast::attention::Heads;
using Bits = uint16_t;  // a bf16 number

constexpr int64_t kUnit = 8192;  // numbers that a thread takes at a time

inline float wide(float x) { return x; }
inline float wide(Bits x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

template <typename T>
T rounded(float x);

template <>
inline float rounded<float>(float x) {
  return x;
}

// To nearest, ties to even. NaN stays: made of bf16 numbers, its lower half is zero.
template <>
inline Bits rounded<Bits>(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return static_cast<Bits>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// What a tensor of T would hold.
template <typename T>
inline float stored(float x) {
  return wide(rounded<T>(x));
}

// ---- RMSNorm of rows x [rows, width]

// 1/√(mean(x²) + eps) of a row.
template <typename T>
float inverse_rms(const T* x, int64_t width, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += wide(x[d]) * wide(x[d]);
  return 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
}

template <typename T>
void norm(const T* x, const T* weight, int64_t rows, int64_t width, float eps, T* out) {
  const int64_t each = std::max<int64_t>(kUnit / width, 1);
  share<char>(ceil_div(rows, each), 0, [&](int64_t unit, char*) {
    for (int64_t i = unit * each; i < std::min(rows, (unit + 1) * each); ++i) {
      const T* from = x + i * width;
      T* to = out + i * width;
      const float r = inverse_rms(from, width, eps);
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) to[d] = rounded<T>(wide(weight[d]) * stored<T>(wide(from[d]) * r));
    }
  });
}

// dx of one row; adds to dw [width], unless that is null.
template <typename T>
void norm_row_backward(const T* g, const T* x, const T* weight, int64_t width, float eps, T* dx, float* dw) {
  const float r = inverse_rms(x, width, eps);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += wide(g[d]) * wide(weight[d]) * wide(x[d]);
  const float along = sum * r * r / static_cast<float>(width);  // mean(g∘w∘y)·r
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) dx[d] = rounded<T>(r * (wide(g[d]) * wide(weight[d]) - wide(x[d]) * along));
  if (dw == nullptr) return;
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) dw[d] += wide(g[d]) * (wide(x[d]) * r);
}

// Sums of dw over a few rows, of these over the rows of a unit, of these over the units: in one go, the last rows of many
// would add to numbers of which they no longer change the last digits.
template <typename T>
void norm_backward(const T* g, const T* x, const T* weight, int64_t rows, int64_t width, float eps, T* dx, T* dw) {
  constexpr int64_t kUnits = 64, kFew = 32;
  const int64_t each = std::max<int64_t>(ceil_div(rows, kUnits), 1), units = ceil_div(rows, each);
  const int64_t sums = dw == nullptr ? 0 : width;
  const auto total = pact_fast::buffer<float>(units * sums);
  share<float>(units, sums, [&](int64_t unit, float* few) {
    float* mine = total.get() + unit * sums;
    std::fill_n(mine, sums, 0.0f);
    const int64_t end = std::min(rows, (unit + 1) * each);
    for (int64_t first = unit * each; first < end; first += kFew) {
      std::fill_n(few, sums, 0.0f);
      for (int64_t i = first; i < std::min(end, first + kFew); ++i) {
        norm_row_backward(g + i * width, x + i * width, weight, width, eps, dx + i * width, sums == 0 ? nullptr : few);
      }
      for (int64_t d = 0; d < sums; ++d) mine[d] += few[d];
    }
  });
  for (int64_t d = 0; d < sums; ++d) {
    float sum = 0.0f;
    for (int64_t unit = 0; unit < units; ++unit) sum += total[unit * sums + d];
    dw[d] = rounded<T>(sum);
  }
}

// ---- the gated unit

// σ(a), 0 where its exponential would not be finite.
inline float sigmoid(float a) {
  const float s = 1.0f / (1.0f + pact_fast::exp_fast(std::min(-a, 88.0f)));
  return a < -88.0f ? 0.0f : s;
}

template <typename T>
void gated(const T* gate, const T* up, int64_t count, T* out) {
  share<char>(ceil_div(count, kUnit), 0, [&](int64_t unit, char*) {
    const int64_t end = std::min(count, (unit + 1) * kUnit);
#pragma omp simd
    for (int64_t i = unit * kUnit; i < end; ++i) {
      const float a = wide(gate[i]);
      out[i] = rounded<T>(stored<T>(a * sigmoid(a)) * wide(up[i]));
    }
  });
}

// And out, as `gated` makes it, where the backward pass of a product that follows needs it again. d_gate may be g.
template <bool again, typename T>
void gated_backward(const T* g, const T* gate, const T* up, int64_t count, T* d_gate, T* d_up, T* out) {
  share<char>(ceil_div(count, kUnit), 0, [&](int64_t unit, char*) {
    const int64_t end = std::min(count, (unit + 1) * kUnit);
#pragma omp simd
    for (int64_t i = unit * kUnit; i < end; ++i) {
      const float a = wide(gate[i]), b = wide(up[i]), from = wide(g[i]), s = sigmoid(a), silu = a * s;
      d_gate[i] = rounded<T>(from * b * s * (1.0f + a * (1.0f - s)));
      d_up[i] = rounded<T>(from * silu);
      if constexpr (again) out[i] = rounded<T>(stored<T>(silu) * b);
    }
  });
}

// ---- rotary embeddings

template <bool back, typename T>
void rotate_row(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  const T *y = x + half, *cos_y = cos + half, *sin_y = sin + half;
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    const float a = wide(x[d]), b = wide(y[d]);
    const float to_a = back ? b * wide(sin_y[d]) : -(b * wide(sin[d])), to_b = back ? -(a * wide(sin[d])) : a * wide(sin_y[d]);
    out[d] = rounded<T>(stored<T>(a * wide(cos[d])) + stored<T>(to_a));
    out[half + d] = rounded<T>(stored<T>(b * wide(cos_y[d])) + stored<T>(to_b));
  }
}

template <typename T>
void rotate(const Heads<T>& x, const T* cos, const T* sin, int64_t heads, int64_t rows, int64_t width, bool back,
            const Heads<T>& out) {
  const int64_t each = std::max<int64_t>(kUnit / (heads * width), 1);
  share<char>(ceil_div(rows, each), 0, [&](int64_t unit, char*) {
    for (int64_t t = unit * each; t < std::min(rows, (unit + 1) * each); ++t) {
      const T *c = cos + t * width, *s = sin + t * width;
      for (int64_t h = 0; h < heads; ++h) {
        back ? rotate_row<true>(x.at(h, t), c, s, width / 2, out.at(h, t))
             : rotate_row<false>(x.at(h, t), c, s, width / 2, out.at(h, t));
      }
    }
  });
}

// ---- tensors

template <typename T>
T* numbers(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

void check(const Tensor& t, const Tensor& like, int64_t count, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16) && type == like.scalar_type() &&
                      t.is_contiguous() && t.numel() == count,
                  "pact_fast: ", name, " must be contiguous, of the right size and of one dtype with the others, fp32 or bf16");
}

// work(T{}) for the numbers that the tensor holds.
template <typename Work>
void by_type(const Tensor& t, const Work& work) {
  t.scalar_type() == ScalarType::Float ? work(float{}) : work(Bits{});
}

}  // namespace

// out ← weight·x/√(mean(x²) + eps) over the last dimension. x and out [..., D], weight [D].
void rms_norm(const Tensor x, const Tensor weight, double eps, Tensor out) {
  const int64_t width = weight.numel(), rows = width == 0 ? 0 : x.numel() / width;
  for (const auto& [t, name] : {std::pair{x, "x"}, {out, "out"}}) check(t, weight, rows * width, name);
  check(weight, x, width, "weight");
  by_type(x, [&]<typename T>(T) {
    norm<T>(numbers<T>(x), numbers<T>(weight), rows, width, static_cast<float>(eps), numbers<T>(out));
  });
}

void rms_norm_backward(const Tensor grad, const Tensor x, const Tensor weight, double eps, Tensor dx,
                       std::optional<Tensor> d_weight) {
  const int64_t width = weight.numel(), rows = width == 0 ? 0 : x.numel() / width;
  for (const auto& [t, name] : {std::pair{grad, "grad"}, {x, "x"}, {dx, "dx"}}) check(t, weight, rows * width, name);
  if (d_weight) check(*d_weight, weight, width, "d_weight");
  by_type(x, [&]<typename T>(T) {
    norm_backward<T>(numbers<T>(grad), numbers<T>(x), numbers<T>(weight), rows, width, static_cast<float>(eps),
                     numbers<T>(dx), d_weight ? numbers<T>(*d_weight) : nullptr);
  });
}

// out ← silu(gate)·up; all of one shape.
void silu_mul(const Tensor gate, const Tensor up, Tensor out) {
  for (const auto& [t, name] : {std::pair{up, "up"}, {gate, "gate"}, {out, "out"}}) check(t, gate, gate.numel(), name);
  by_type(gate, [&]<typename T>(T) { gated<T>(numbers<T>(gate), numbers<T>(up), gate.numel(), numbers<T>(out)); });
}

// d_gate may be grad. out, if given, is what silu_mul makes.
void silu_mul_backward(const Tensor grad, const Tensor gate, const Tensor up, Tensor d_gate, Tensor d_up,
                       std::optional<Tensor> out) {
  for (const auto& [t, name] : {std::pair{grad, "grad"}, {up, "up"}, {gate, "gate"}, {d_gate, "d_gate"},
                                {d_up, "d_up"}, {out.value_or(gate), "out"}}) {
    check(t, gate, gate.numel(), name);
  }
  by_type(gate, [&]<typename T>(T) {
    const auto work = out ? gated_backward<true, T> : gated_backward<false, T>;
    work(numbers<T>(grad), numbers<T>(gate), numbers<T>(up), gate.numel(), numbers<T>(d_gate), numbers<T>(d_up),
         out ? numbers<T>(*out) : nullptr);
  });
}

// out ← x turned by its positions' angles, or back, as a gradient is. x and out [1, H, T, D] with contiguous heads, cos and
// sin [1, T, D].
void rotary(const Tensor x, const Tensor cos, const Tensor sin, bool back, Tensor out) {
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == 1 && t.stride(3) == 1 && t.scalar_type() == cos.scalar_type();
  };
  STD_TORCH_CHECK(fits(x) && fits(out) && x.size(3) % 2 == 0, "pact_fast: x and out must be [1, H, T, D] of one dtype with cos");
  const int64_t heads = x.size(1), rows = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(out.size(1) == heads && out.size(2) == rows && out.size(3) == width, "pact_fast: out must be as large as x");
  for (const auto& [t, name] : {std::pair{cos, "cos"}, {sin, "sin"}}) check(t, cos, rows * width, name);
  by_type(x, [&]<typename T>(T) {
    const auto view = [](const Tensor& t) { return Heads<T>{numbers<T>(t), t.stride(1), t.stride(2)}; };
    rotate<T>(view(x), numbers<T>(cos), numbers<T>(sin), heads, rows, width, back, view(out));
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool back, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor(a!) dx, Tensor(b!)? d_weight) -> ()");
  m.def("silu_mul(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def(
      "silu_mul_backward(Tensor grad, Tensor gate, Tensor up, Tensor(a!) d_gate, Tensor(b!) d_up, Tensor(c!)? out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("rotary", TORCH_BOX(&rotary));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&silu_mul_backward));
}
