// Attention over a packed tree on CPU, forward and backward, for bf16 and fp32.
//
// Rows lie in depth-first order, so that the rows that see key k are k ≤ q < end[k], where end[k] is the row after the subtree
// that k belongs to. That is all of the mask: scores are made in tiles of 64 keys by 64 rows, a tile that nobody sees is
// skipped, and one that not all of its rows see whole is masked. Nothing is merged, whatever the depth of the tree.
//
//     forward     Sᵀ = K·Qᵀ,    Pᵀ = exp(scale·Sᵀ − lse),     Oᵀ += Vᵀ·Pᵀ        (a running maximum and sum instead of lse)
//     backward    dPᵀ = V·dOᵀ,  dSᵀ = Pᵀ∘(dPᵀ − Σ dO∘O),    dV += Pᵀ·dO,  dK += dSᵀ·Q,  dQᵀ += Kᵀ·dSᵀ
//
//  * Everything is transposed, keys by rows, for two reasons. Sixteen rows fill a register, so that their maxima and sums
//    need no step across it and the mask of a key is a range of bits; and Pᵀ and dSᵀ, as they are made, are what the next
//    products take: no score is ever moved.
//  * Products are oneDNN's block product (brgemm.h), nearly as fast on tiles of this size as on large matrices.
//  * Forward, a unit of work owns some tiles of rows of one head; backward, of keys of one head of keys, for all the
//    heads of queries that share it. Many units add to dQ then: for each tile of rows they take turns in the order of keys, so
//    that results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "attention_views.h"
#include "work.h"

#ifdef __AVX512F__
#include "attention_backward.h"
#include "attention_forward.h"
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using pact_fast::attention::Heads;
using pact_fast::attention::Inputs;
using pact_fast::attention::Sizes;

#ifdef __AVX512F__
using pact_fast::Bits;

template <typename T>
void forward(const Inputs<T>& in, const Heads<T>& out, float* lse) {
  pact_fast::attention::Forward<T>{in, out, lse}.run();
}

template <typename T>
void backward(const Inputs<T>& in, const pact_fast::attention::Grads<T>& grads) {
  pact_fast::attention::Backward<T>{in, grads}.run();
}

bool ready(ScalarType type) {
  static const bool fp32 = pact_fast::brgemm_ready<float>();
  if (type == ScalarType::Float) return fp32;
#ifdef __AVX512BF16__
  static const bool bf16 = pact_fast::brgemm_ready<Bits>();
  return type == ScalarType::BFloat16 && bf16;
#else
  return false;
#endif
}

#else  // callers ask tree_attention_ready first

bool ready(ScalarType) { return false; }

#endif

template <typename T>
Heads<T> heads(const Tensor& t) {
  return {static_cast<T*>(t.data_ptr()), t.stride(1), t.stride(2)};
}

// [1, H, T, D] with contiguous heads.
void check(const Tensor& t, ScalarType type, int64_t h, int64_t rows, int64_t width, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == type && t.size(0) == 1 && t.size(1) == h && t.size(2) == rows &&
                      t.size(3) == width && t.stride(3) == 1,
                  "tree attention: ", name, " must be [1, heads, rows, width] of one dtype with contiguous heads");
}

Sizes sizes(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "tree attention: q, k and v must be [1, heads, rows, width]");
  const Sizes size{q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), static_cast<float>(scale)};
  STD_TORCH_CHECK(ready(q.scalar_type()), "tree attention: no block product for this dtype here");
  STD_TORCH_CHECK(scale > 0 && size.width % 16 == 0 && size.width > 0 && size.width <= 256,
                  "tree attention: wants a positive scale, and heads of a multiple of 16 and up to 256 numbers");
  STD_TORCH_CHECK(size.groups > 0 && size.heads % size.groups == 0 && size.keys >= size.rows,
                  "tree attention: wants heads of keys to divide those of queries, and a key for each row");
  check(q, q.scalar_type(), size.heads, size.rows, size.width, "q");
  check(k, q.scalar_type(), size.groups, size.keys, size.width, "k");
  check(v, q.scalar_type(), size.groups, size.keys, size.width, "v");
  STD_TORCH_CHECK(end.dim() == 1 && end.size(0) == size.keys && end.scalar_type() == ScalarType::Long && end.is_contiguous(),
                  "tree attention: end must be int64 [keys]");
  return size;
}

template <typename T>
Inputs<T> inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end, const Sizes& size) {
  return {heads<const T>(q), heads<const T>(k), heads<const T>(v), static_cast<const int64_t*>(end.data_ptr()), size};
}

void check_lse(const Tensor& lse, const Sizes& size) {
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() && lse.numel() == 2 * size.heads * size.rows,
                  "tree attention: lse must be fp32 [2, heads, rows]");
}

}  // namespace

bool tree_attention_ready(ScalarType type) { return ready(type); }

// out [1, Hq, T, D], lse [2, Hq, T] (two terms of log-sum-exp in base 2) ← attention of q [1, Hq, T, D] to k, v
// [1, Hkv, S + T, D], the last T of which are those of the rows themselves. Row i sees key k if k ≤ S + i < end[k].
void tree_attention_forward(const Tensor q, const Tensor k, const Tensor v, const Tensor end, double scale, Tensor out,
                            Tensor lse) {
  const Sizes size = sizes(q, k, v, end, scale);
  check(out, q.scalar_type(), size.heads, size.rows, size.width, "out");
  check_lse(lse, size);
#ifdef __AVX512F__
  float* to = static_cast<float*>(lse.data_ptr());
  if (q.scalar_type() == ScalarType::Float) return forward<float>(inputs<float>(q, k, v, end, size), heads<float>(out), to);
#ifdef __AVX512BF16__
  forward<Bits>(inputs<Bits>(q, k, v, end, size), heads<Bits>(out), to);
#endif
#endif
}

// dq, dk and dv, overwritten, from d_out and what the forward pass took and gave; work: fp32 [Hq, T up to whole tiles of 64,
// D + 3], overwritten.
void tree_attention_backward(const Tensor d_out, const Tensor q, const Tensor k, const Tensor v, const Tensor end,
                             double scale, const Tensor out, const Tensor lse, Tensor work, Tensor dq, Tensor dk,
                             Tensor dv) {
  const Sizes size = sizes(q, k, v, end, scale);
  const ScalarType type = q.scalar_type();
  check(d_out, type, size.heads, size.rows, size.width, "d_out");
  check(out, type, size.heads, size.rows, size.width, "out");
  check(dq, type, size.heads, size.rows, size.width, "dq");
  check(dk, type, size.groups, size.keys, size.width, "dk");
  check(dv, type, size.groups, size.keys, size.width, "dv");
  check_lse(lse, size);
  STD_TORCH_CHECK(work.scalar_type() == ScalarType::Float && work.is_contiguous() &&
                      work.numel() >= size.heads * pact_fast::round_up(size.rows, 64) * (size.width + 3),
                  "tree attention: work must be fp32 [heads, rows up to whole tiles, width + 3]");
#ifdef __AVX512F__
  const auto run = [&]<typename T>(T) {
    backward<T>(inputs<T>(q, k, v, end, size),
                {heads<const T>(out), heads<const T>(d_out), static_cast<const float*>(lse.data_ptr()),
                 static_cast<float*>(work.data_ptr()), heads<T>(dq), heads<T>(dk), heads<T>(dv)});
  };
  if (type == ScalarType::Float) return run(float{});
#ifdef __AVX512BF16__
  run(Bits{});
#endif
#endif
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("tree_attention_ready(ScalarType dtype) -> bool");
  m.def(
      "tree_attention_forward(Tensor q, Tensor k, Tensor v, Tensor end, float scale, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "tree_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor end, float scale, Tensor out, Tensor lse, "
      "Tensor(a!) work, Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("tree_attention_ready", TORCH_BOX(&tree_attention_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("tree_attention_forward", TORCH_BOX(&tree_attention_forward));
  m.impl("tree_attention_backward", TORCH_BOX(&tree_attention_backward));
}
