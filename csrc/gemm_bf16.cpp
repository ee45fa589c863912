// The three GEMMs of the fused head for bf16 elements with fp32 results, on CPUs with AVX512-BF16 or AMX.
//
//     Z[n, V] = X·Wᵀ        dX[n, D] = bf16(dZ)·W        dW[V, D] += bf16(dZ)ᵀ·X        (dW: split_accumulator.h)
//
// PyTorch has no such GEMM on CPU: its bf16 GEMM rounds the result, and an fp32 GEMM leaves the bf16 units idle. It
// exports oneDNN's BRGEMM, the micro-kernel inside, which is called here (gemm_bf16_panels.h, gemm_bf16_grads.h).

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "common/tensor.h"
#include "gemm_bf16_grads.h"

namespace pact_fast::head {
namespace {

#ifdef __AVX512BF16__

void logits(const bf16_t* x, const bf16_t* weight, float* z, int64_t ldz, const HeadShape& shape) {
  const LogitPanels panels(x, weight, shape);
  const auto layout = [&](ScratchArena& arena) { return panels.take_panel(arena); };
  parallel_for_dynamic<AmxTileGuard>(panels.count(), layout, [&](int64_t p, bf16_t* packed) {
    const auto to = [&](int64_t i) { return z + i * ldz + p * kNR; };
    panels.compute(p, packed, ldz, to, [](int64_t, int64_t) {});
  });
}

// dZ as it is given, in fp32.
struct Fp32Dz {
  const float* dz;
  int64_t ld, rows;

  void round(int64_t v, int64_t columns, int64_t i, bf16_t* a, bf16_t* at, int64_t ld_at) const {
    for (int64_t j = 0; j < columns; j += 16) {
      const __mmask16 mask = lane_mask16(columns - j);
      const float* tile = dz + i * ld + v + j;
      const auto load = [&](int64_t row) { return _mm512_maskz_loadu_ps(i + row < rows ? mask : 0, tile + row * ld); };
      round_tile(load, a == nullptr ? nullptr : a + j, at == nullptr ? nullptr : at + j * ld_at, ld_at);
    }
  }
};

void grads(const float* dz, int64_t lddz, const bf16_t* x, const bf16_t* weight, float* dx,
           const SplitAccumulator& d_weight, const HeadShape& shape) {
  bf16_head_grads(Fp32Dz{dz, lddz, shape.rows}, x, weight, dx, d_weight, shape);
}

#else  // callers ask bf16_gemm_ready first

void logits(const bf16_t*, const bf16_t*, float*, int64_t, const HeadShape&) {}
void grads(const float*, int64_t, const bf16_t*, const bf16_t*, float*, const SplitAccumulator&, const HeadShape&) {}

#endif

bool bf16_gemm_ready() { return ready(); }

// z ← x·Wᵀ: x [n, D], weight [V, D] bf16, contiguous; z [n, V] fp32 with contiguous rows.
void bf16_logits(const Tensor x, const Tensor weight, Tensor z) {
  const HeadShape shape = check_shape(x, weight);
  check_rows(z, ScalarType::Float, shape.rows, shape.vocab, "z");
  logits(data_ptr<bf16_t>(x), data_ptr<bf16_t>(weight), data_ptr<float>(z), z.stride(0), shape);
}

// dx ← bf16(dz)·W; d_weight ← bf16(dz)ᵀ·x or, if `add`, d_weight += bf16(dz)ᵀ·x. dz [n, V] fp32 with contiguous
// rows; dx [n, D] fp32. d_weight [V, D] bf16 and lo [V, D] int8 are the parts of a SplitAccumulator, given together
// or not at all.
void bf16_grads(const Tensor dz, const Tensor x, const Tensor weight, std::optional<Tensor> dx,
                std::optional<Tensor> d_weight, std::optional<Tensor> lo, bool add) {
  const HeadShape shape = check_shape(x, weight);
  const auto [rows, vocab, width] = shape;
  check_rows(dz, ScalarType::Float, rows, vocab, "dz");
  check_grads(shape, dx, d_weight, lo);
  for (int64_t i = 0; i < rows; i += kMaxRows) {
    grads(data_ptr<float>(dz) + i * dz.stride(0), dz.stride(0), data_ptr<bf16_t>(x) + i * width,
          data_ptr<bf16_t>(weight), dx ? data_ptr<float>(*dx) + i * width : nullptr,
          {data_ptr<bf16_t>(d_weight), data_ptr<int8_t>(lo), width, add || i > 0},
          {std::min(kMaxRows, rows - i), vocab, width});
  }
}

}  // namespace
}  // namespace pact_fast::head

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("bf16_gemm_ready() -> bool");
  m.def("bf16_logits(Tensor x, Tensor weight, Tensor(a!) z) -> ()");
  m.def(
      "bf16_grads(Tensor dz, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? d_weight, Tensor(c!)? lo, bool add) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("bf16_gemm_ready", TORCH_BOX(&pact_fast::head::bf16_gemm_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("bf16_logits", TORCH_BOX(&pact_fast::head::bf16_logits));
  m.impl("bf16_grads", TORCH_BOX(&pact_fast::head::bf16_grads));
}
