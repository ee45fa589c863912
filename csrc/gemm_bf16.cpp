// The three products of the fused head for bf16 values, with fp32 results, on CPUs with bf16 instructions.
//
//     z[n, V] = x·Wᵀ        dx[n, D] = bf16(dz)·W        dW[V, D] += bf16(dz)ᵀ·x        (dW: 24 bits, see grads_bf16.h)
//
// PyTorch has no such matrix product on CPU: its bf16 one rounds the result, and an fp32 one leaves the bf16 units idle.
// Inside it is oneDNN's block product, which we call here (panels_bf16.h); this file decides who works on what.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "grads_bf16.h"

namespace pact_fast::bf16 {
namespace {

#ifdef __AVX512BF16__

void logits(const Bits* x, const Bits* weight, float* z, int64_t rows, int64_t vocab, int64_t width, int64_t z_stride) {
  const LogitPanels panels{Even(x, rows, width), weight, rows, vocab, width};
  share(panels.count(), panels.packed(), [&](int64_t p, Bits* packed) {
    const auto place = [&](int64_t i) { return z + i * z_stride + p * kPanel; };
    panels.panel(p, packed, z_stride, place, [](int64_t, int64_t) {});
  });
}

// dz as it is, in fp32.
struct Values {
  const float* dz;
  int64_t ld, rows;

  void round(int64_t v, int64_t columns, int64_t i, Bits* a, Bits* at, int64_t depth) const {
    for (int64_t j = 0; j < columns; j += 16) {
      const auto mask = static_cast<__mmask16>(lanes(columns - j));
      const float* tile = dz + i * ld + v + j;
      const auto load = [&](int64_t row) { return _mm512_maskz_loadu_ps(i + row < rows ? mask : 0, tile + row * ld); };
      round_tile(load, a == nullptr ? nullptr : a + j, at == nullptr ? nullptr : at + j * depth, depth);
    }
  }
};

void grads(const float* dz, int64_t dz_stride, const Bits* x, const Bits* weight, float* dx, const Sums& d_weight,
           int64_t rows, int64_t vocab, int64_t width) {
  const Values values{dz, dz_stride, rows};
  Grads<Values>{values, x, weight, dx, d_weight, rows, vocab, width}.run();
}

#else  // callers ask bf16_products_ready first

void logits(const Bits*, const Bits*, float*, int64_t, int64_t, int64_t, int64_t) {}
void grads(const float*, int64_t, const Bits*, const Bits*, float*, const Sums&, int64_t, int64_t, int64_t) {}

#endif

}  // namespace
}  // namespace pact_fast::bf16

using namespace pact_fast::bf16;

bool bf16_products_ready() { return ready(); }

// z ← x·Wᵀ: x [n, D], weight [V, D] bf16, contiguous; z [n, V] fp32, rows contiguous.
void bf16_logits(const Tensor x, const Tensor weight, Tensor z) {
  check_factors(x, weight);
  const int64_t rows = x.size(0), vocab = weight.size(0), width = x.size(1);
  STD_TORCH_CHECK(is_rows(z, rows, vocab), "z: fp32, a row for each of x, a column for each row of weight");
  logits(data<Bits>(x), data<Bits>(weight), data<float>(z), rows, vocab, width, z.stride(0));
}

// dx ← dz·W and d_weight ← or, if `add`, += dzᵀ·x, dz [n, V] fp32 (rows contiguous) rounded to bf16; dx [n, D] fp32.
// d_weight [V, D] bf16 is the rounded sum, rest [V, D] int8 what it lacks (see `split`); both are given or neither.
void bf16_grads(const Tensor dz, const Tensor x, const Tensor weight, std::optional<Tensor> dx,
                std::optional<Tensor> d_weight, std::optional<Tensor> rest, bool add) {
  check_factors(x, weight);
  check_grads(x, weight, dx, d_weight, rest);
  const int64_t rows = x.size(0), vocab = weight.size(0), width = x.size(1);
  STD_TORCH_CHECK(is_rows(dz, rows, vocab), "dz: fp32, a row for each of x, a column for each row of weight");
  for (int64_t i = 0; i < rows; i += kRows) {
    const Sums sums{d_weight ? data<Bits>(*d_weight) : nullptr, rest ? data<int8_t>(*rest) : nullptr, width, add || i > 0};
    grads(data<float>(dz) + i * dz.stride(0), dz.stride(0), data<Bits>(x) + i * width, data<Bits>(weight),
          dx ? data<float>(*dx) + i * width : nullptr, sums, std::min(kRows, rows - i), vocab, width);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("bf16_products_ready() -> bool");
  m.def("bf16_logits(Tensor x, Tensor weight, Tensor(a!) z) -> ()");
  m.def(
      "bf16_grads(Tensor dz, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? d_weight, "
      "Tensor(c!)? rest, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("bf16_products_ready", TORCH_BOX(&bf16_products_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("bf16_logits", TORCH_BOX(&bf16_logits));
  m.impl("bf16_grads", TORCH_BOX(&bf16_grads));
}
