// The pointwise ops of a decoder layer on CPU, each in one pass over memory: RMSNorm, SwiGLU's silu(gate)·up, and
// rotary embeddings.
//
// As a chain of torch ops, RMSNorm in bf16 reads or writes its rows eleven times, most of them in fp32 and in
// memory that the system has to hand out first. The forward pass rounds where the chain does, so that both give
// nearly always the same bits; the backward pass stays in fp32 until it stores.
//
//     rms_norm   y = x·r, r = 1/√(mean(x²) + eps), out = w·y      dx = r·(g∘w − y·mean(g∘w∘y)),  dw = Σ g∘y  over rows
//     silu_mul   out = silu(a)·u, silu(a) = a·σ(a)                da = g·u·σ(a)·(1 + a·(1 − σ(a))),  du = g·silu(a)
//     rotary     out = x∘cos + (−x₂, x₁)∘sin, x = (x₁, x₂)        dx = g∘cos + (h₂, −h₁), h = g∘sin
//
// Work is split by rows or elements, not by threads: results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <utility>

#include "common/bf16.h"
#include "common/exp.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace pact_fast {
namespace {

constexpr int64_t kUnit = 8192;  // elements per unit of work

// Rows of `row_size` elements per unit of work.
constexpr int64_t unit_rows(int64_t row_size) { return std::max<int64_t>(kUnit / std::max<int64_t>(row_size, 1), 1); }

// ---- RMSNorm of rows x [rows, width]

// 1/√(mean(x²) + eps) of a row.
template <typename T>
float inverse_rms(const T* x, int64_t width, float eps) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += to_float(x[d]) * to_float(x[d]);
  return 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
}

template <typename T>
void norm(const T* x, const T* weight, int64_t rows, int64_t width, float eps, T* out) {
  const int64_t each = unit_rows(width);
  parallel_for_dynamic(ceil_div(rows, each), [&](int64_t unit) {
    for (int64_t i = unit * each; i < std::min(rows, (unit + 1) * each); ++i) {
      const T* from = x + i * width;
      T* to = out + i * width;
      const float r = inverse_rms(from, width, eps);
#pragma omp simd
      for (int64_t d = 0; d < width; ++d)
        to[d] = from_float<T>(to_float(weight[d]) * round_trip<T>(to_float(from[d]) * r));
    }
  });
}

// dx of one row; adds the row's part to dw [width], which may be null.
template <typename T>
void norm_row_backward(const T* g, const T* x, const T* weight, int64_t width, float eps, T* dx, float* dw) {
  const float r = inverse_rms(x, width, eps);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += to_float(g[d]) * to_float(weight[d]) * to_float(x[d]);
  const float projection = sum * r * r / static_cast<float>(width);  // mean(g∘w∘y)·r
#pragma omp simd
  for (int64_t d = 0; d < width; ++d)
    dx[d] = from_float<T>(r * (to_float(g[d]) * to_float(weight[d]) - to_float(x[d]) * projection));
  if (dw == nullptr) return;
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) dw[d] += to_float(g[d]) * (to_float(x[d]) * r);
}

// dw is summed over blocks of kBlock rows, these over the rows of a unit, and these over the units: in one running
// sum, the last of many rows would fall below its last digit.
template <typename T>
void norm_backward(const T* g, const T* x, const T* weight, int64_t rows, int64_t width, float eps, T* dx, T* dw) {
  constexpr int64_t kUnits = 64, kBlock = 32;
  const int64_t each = std::max<int64_t>(ceil_div(rows, kUnits), 1), units = ceil_div(rows, each);
  const int64_t dw_width = dw == nullptr ? 0 : width;
  const auto unit_sums = aligned_buffer<float>(units * dw_width);
  const auto layout = [&](ScratchArena& arena) { return arena.take<float>(/* block_sum */ dw_width); };
  parallel_for_dynamic(units, layout, [&](int64_t unit, float* block_sum) {
    float* unit_sum = unit_sums.get() + unit * dw_width;
    std::fill_n(unit_sum, dw_width, 0.0f);
    const int64_t end = std::min(rows, (unit + 1) * each);
    for (int64_t first = unit * each; first < end; first += kBlock) {
      std::fill_n(block_sum, dw_width, 0.0f);
      for (int64_t i = first; i < std::min(end, first + kBlock); ++i) {
        norm_row_backward(g + i * width, x + i * width, weight, width, eps, dx + i * width,
                          dw_width == 0 ? nullptr : block_sum);
      }
      for (int64_t d = 0; d < dw_width; ++d) unit_sum[d] += block_sum[d];
    }
  });
  for (int64_t d = 0; d < dw_width; ++d) {
    float sum = 0.0f;
    for (int64_t unit = 0; unit < units; ++unit) sum += unit_sums[unit * dw_width + d];
    dw[d] = from_float<T>(sum);
  }
}

// ---- SwiGLU: silu(gate)·up

// σ(a); 0 where exp(−a) would overflow.
inline float sigmoid(float a) {
  const float s = 1.0f / (1.0f + exp_fast(std::min(-a, 88.0f)));
  return a < -88.0f ? 0.0f : s;
}

template <typename T>
void silu_mul_forward(const T* gate, const T* up, int64_t count, T* out) {
  parallel_for_dynamic(ceil_div(count, kUnit), [&](int64_t unit) {
    const int64_t end = std::min(count, (unit + 1) * kUnit);
#pragma omp simd
    for (int64_t i = unit * kUnit; i < end; ++i) {
      const float a = to_float(gate[i]);
      out[i] = from_float<T>(round_trip<T>(a * sigmoid(a)) * to_float(up[i]));
    }
  });
}

// With `recompute_out` also the forward result, which the backward pass of a following GEMM needs. d_gate may be g.
template <bool recompute_out, typename T>
void silu_mul_grads(const T* g, const T* gate, const T* up, int64_t count, T* d_gate, T* d_up, T* out) {
  parallel_for_dynamic(ceil_div(count, kUnit), [&](int64_t unit) {
    const int64_t end = std::min(count, (unit + 1) * kUnit);
#pragma omp simd
    for (int64_t i = unit * kUnit; i < end; ++i) {
      const float a = to_float(gate[i]), b = to_float(up[i]), upstream = to_float(g[i]), s = sigmoid(a), silu = a * s;
      d_gate[i] = from_float<T>(upstream * b * s * (1.0f + a * (1.0f - s)));
      d_up[i] = from_float<T>(upstream * silu);
      if constexpr (recompute_out) out[i] = from_float<T>(round_trip<T>(silu) * b);
    }
  });
}

// ---- rotary embeddings

template <bool inverse, typename T>
void rotate_row(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  const T *y = x + half, *cos_y = cos + half, *sin_y = sin + half;
#pragma omp simd
  for (int64_t d = 0; d < half; ++d) {
    const float a = to_float(x[d]), b = to_float(y[d]);
    const float to_a = inverse ? b * to_float(sin_y[d]) : -(b * to_float(sin[d])),
                to_b = inverse ? -(a * to_float(sin[d])) : a * to_float(sin_y[d]);
    out[d] = from_float<T>(round_trip<T>(a * to_float(cos[d])) + round_trip<T>(to_a));
    out[half + d] = from_float<T>(round_trip<T>(b * to_float(cos_y[d])) + round_trip<T>(to_b));
  }
}

template <typename T>
void rotate(const HeadView<T>& x, const T* cos, const T* sin, int64_t heads, int64_t rows, int64_t width, bool inverse,
            const HeadView<T>& out) {
  const int64_t each = unit_rows(heads * width);
  parallel_for_dynamic(ceil_div(rows, each), [&](int64_t unit) {
    for (int64_t t = unit * each; t < std::min(rows, (unit + 1) * each); ++t) {
      const T *c = cos + t * width, *s = sin + t * width;
      for (int64_t h = 0; h < heads; ++h) {
        inverse ? rotate_row<true>(x.at(h, t), c, s, width / 2, out.at(h, t))
                : rotate_row<false>(x.at(h, t), c, s, width / 2, out.at(h, t));
      }
    }
  });
}

// ---- ops

// Contiguous, of the dtype of `like`, which is fp32 or bf16.
void check(const Tensor& t, const Tensor& like, int64_t count, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Float || type == ScalarType::BFloat16) && type == like.scalar_type() &&
                      t.is_contiguous() && t.numel() == count,
                  "pact_fast: ", name,
                  " must be contiguous, of the right size and of one dtype with the others, fp32 or bf16");
}

// Calls run(T{}) with T the element type of the tensor.
template <typename Run>
void dispatch(const Tensor& t, const Run& run) {
  t.scalar_type() == ScalarType::Float ? run(float{}) : run(bf16_t{});
}

// out ← weight·x/√(mean(x²) + eps) over the last dimension. x and out [..., D], weight [D].
void rms_norm(const Tensor x, const Tensor weight, double eps, Tensor out) {
  const int64_t width = weight.numel(), rows = width == 0 ? 0 : x.numel() / width;
  for (const auto& [t, name] : {std::pair{x, "x"}, {out, "out"}}) check(t, weight, rows * width, name);
  check(weight, x, width, "weight");
  dispatch(x, [&]<typename T>(T) {
    norm<T>(data_ptr<T>(x), data_ptr<T>(weight), rows, width, static_cast<float>(eps), data_ptr<T>(out));
  });
}

// dx, and d_weight unless it is missing, from grad, x and weight.
void rms_norm_backward(const Tensor grad, const Tensor x, const Tensor weight, double eps, Tensor dx,
                       std::optional<Tensor> d_weight) {
  const int64_t width = weight.numel(), rows = width == 0 ? 0 : x.numel() / width;
  for (const auto& [t, name] : {std::pair{grad, "grad"}, {x, "x"}, {dx, "dx"}}) check(t, weight, rows * width, name);
  check(weight, x, width, "weight");
  if (d_weight) check(*d_weight, weight, width, "d_weight");
  dispatch(x, [&]<typename T>(T) {
    norm_backward<T>(data_ptr<T>(grad), data_ptr<T>(x), data_ptr<T>(weight), rows, width, static_cast<float>(eps),
                     data_ptr<T>(dx), data_ptr<T>(d_weight));
  });
}

// out ← silu(gate)·up; all of one shape.
void silu_mul(const Tensor gate, const Tensor up, Tensor out) {
  for (const auto& [t, name] : {std::pair{up, "up"}, {gate, "gate"}, {out, "out"}}) check(t, gate, gate.numel(), name);
  dispatch(gate, [&]<typename T>(T) {
    silu_mul_forward<T>(data_ptr<T>(gate), data_ptr<T>(up), gate.numel(), data_ptr<T>(out));
  });
}

// d_gate and d_up; d_gate may be grad. out, if given, receives the result of silu_mul.
void silu_mul_backward(const Tensor grad, const Tensor gate, const Tensor up, Tensor d_gate, Tensor d_up,
                       std::optional<Tensor> out) {
  for (const auto& [t, name] : {std::pair{grad, "grad"},
                                {up, "up"},
                                {gate, "gate"},
                                {d_gate, "d_gate"},
                                {d_up, "d_up"},
                                {out.value_or(gate), "out"}}) {
    check(t, gate, gate.numel(), name);
  }
  dispatch(gate, [&]<typename T>(T) {
    const auto run = out ? silu_mul_grads<true, T> : silu_mul_grads<false, T>;
    run(data_ptr<T>(grad), data_ptr<T>(gate), data_ptr<T>(up), gate.numel(), data_ptr<T>(d_gate), data_ptr<T>(d_up),
        data_ptr<T>(out));
  });
}

// out ← x rotated by the angles of its positions; `inverse` rotates back, as the gradient needs it. x and out [1,
// H, T, D] with contiguous rows, cos and sin [1, T, D].
void rotary(const Tensor x, const Tensor cos, const Tensor sin, bool inverse, Tensor out) {
  const auto fits = [&](const Tensor& t) {
    return t.dim() == 4 && t.size(0) == 1 && t.stride(3) == 1 && t.scalar_type() == cos.scalar_type();
  };
  STD_TORCH_CHECK(fits(x) && fits(out) && x.size(3) % 2 == 0,
                  "pact_fast: x and out must be [1, H, T, D] of one dtype with cos");
  const int64_t heads = x.size(1), rows = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(out.size(1) == heads && out.size(2) == rows && out.size(3) == width,
                  "pact_fast: out must have the shape of x");
  for (const auto& [t, name] : {std::pair{cos, "cos"}, {sin, "sin"}}) check(t, cos, rows * width, name);
  dispatch(x, [&]<typename T>(T) {
    rotate<T>(head_view<T>(x), data_ptr<T>(cos), data_ptr<T>(sin), heads, rows, width, inverse, head_view<T>(out));
  });
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("rotary(Tensor x, Tensor cos, Tensor sin, bool inverse, Tensor(a!) out) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()");
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, Tensor(a!) dx, Tensor(b!)? d_weight) -> ()");
  m.def("silu_mul(Tensor gate, Tensor up, Tensor(a!) out) -> ()");
  m.def(
      "silu_mul_backward(Tensor grad, Tensor gate, Tensor up, Tensor(a!) d_gate, Tensor(b!) d_up, Tensor(c!)? out) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("rotary", TORCH_BOX(&pact_fast::rotary));
  m.impl("rms_norm", TORCH_BOX(&pact_fast::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&pact_fast::rms_norm_backward));
  m.impl("silu_mul", TORCH_BOX(&pact_fast::silu_mul));
  m.impl("silu_mul_backward", TORCH_BOX(&pact_fast::silu_mul_backward));
}
