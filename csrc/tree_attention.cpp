// Tree attention on CPU, forward and backward, for bf16 and fp32.
//
// Rows lie in depth-first order: key k is visible to query positions k ≤ q < end[k], where end[k] is the position
// after the subtree of k. That is the whole mask. Scores are computed in tiles of 64 keys × 64 rows; a tile that no
// row sees is skipped, and one that is not visible as a whole is masked. Nothing is merged, whatever the depth of
// the tree. A layer may have a window by position along the path, soft-capped scores and attention sinks (ScoreRule).
//
//     forward     Sᵀ = K·Qᵀ,    Pᵀ = exp(scale·Sᵀ − lse),     Oᵀ += Vᵀ·Pᵀ        (online softmax)
//     backward    dPᵀ = V·dOᵀ,  dSᵀ = Pᵀ∘(dPᵀ − Σ dO∘O),    dV += Pᵀ·dO,  dK += dSᵀ·Q,  dQᵀ += Kᵀ·dSᵀ
//
//  * Scores are transposed, keys by rows. Sixteen rows fill a register, so that their maxima and sums need no
//    reduction across lanes and the mask of a key is a range of bits; and Pᵀ and dSᵀ, as they are computed, are the
//    A and B of the next GEMMs: scores are never moved.
//  * GEMMs are oneDNN's BRGEMM (common/brgemm.h), nearly as fast on tiles of this size as on large matrices.
//  * Forward, a unit of work owns some row tiles of one head. Backward, it owns key tiles of one head of keys, for
//    all heads of queries that share it. Many units then add to dQ: by ticket, in the order of keys, so that
//    results do not depend on the number of threads.

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>

#include "attention_mask.h"
#include "common/tensor.h"

#ifdef __AVX512F__
#include "attention_backward.h"
#include "attention_forward.h"
#endif

namespace pact_fast::attention {
namespace {

#ifdef __AVX512F__

bool ready(ScalarType type) {
  static const bool fp32 = brgemm_ready<float>();
  if (type == ScalarType::Float) return fp32;
#ifdef __AVX512BF16__
  static const bool bf16 = brgemm_ready<bf16_t>();
  return type == ScalarType::BFloat16 && bf16;
#else
  return false;
#endif
}

// Calls run(T{}) with T the element type.
template <typename Run>
void dispatch(ScalarType type, const Run& run) {
  if (type == ScalarType::Float) return run(float{});
#ifdef __AVX512BF16__
  run(bf16_t{});
#endif
}

template <typename T>
AttentionInputs<T> inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end,
                          const AttentionShape& shape, const ScoreRule& rule) {
  return {head_view<const T>(q), head_view<const T>(k), head_view<const T>(v), data_ptr<int64_t>(end), shape, rule};
}

#else  // callers ask tree_attention_ready first

bool ready(ScalarType) { return false; }

#endif

AttentionShape check_shape(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& end, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "tree attention: q, k and v must be [1, heads, rows, head_dim]");
  const AttentionShape shape{q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), static_cast<float>(scale)};
  STD_TORCH_CHECK(ready(q.scalar_type()), "tree attention: no BRGEMM for this dtype on this CPU");
  STD_TORCH_CHECK(scale > 0 && shape.head_dim % 16 == 0 && shape.head_dim > 0 && shape.head_dim <= 256,
                  "tree attention: scale must be positive and head_dim a multiple of 16 up to 256");
  STD_TORCH_CHECK(
      shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0 && shape.keys >= shape.rows,
      "tree attention: the heads of keys must divide those of queries, and there must be a key for each row");
  check_heads(q, q.scalar_type(), shape.heads, shape.rows, shape.head_dim, "q");
  check_heads(k, q.scalar_type(), shape.kv_heads, shape.keys, shape.head_dim, "k");
  check_heads(v, q.scalar_type(), shape.kv_heads, shape.keys, shape.head_dim, "v");
  check_vector(end, ScalarType::Long, shape.keys, "end");
  const int64_t* ends = data_ptr<int64_t>(end);
  for (int64_t key = 0; key < shape.keys; ++key) {
    STD_TORCH_CHECK(key < ends[key] && ends[key] <= shape.keys, "tree attention: end[", key, "] = ", ends[key],
                    " is outside [", key + 1, ", ", shape.keys, "]");
  }
  return shape;
}

void check_lse(const Tensor& lse, const AttentionShape& shape) {
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == 3 && lse.size(0) == 2 &&
                      lse.size(1) == shape.heads && lse.size(2) == shape.rows && lse.is_contiguous(),
                  "tree attention: lse must be contiguous fp32 [2, ", shape.heads, ", ", shape.rows, "]");
}

ScoreRule check_rule(const std::optional<Tensor>& position, int64_t window, double softcap,
                     const std::optional<Tensor>& sinks, const AttentionShape& shape) {
  STD_TORCH_CHECK(window >= 0 && softcap >= 0, "tree attention: window and softcap must not be negative");
  STD_TORCH_CHECK(window == 0 || position.has_value(), "tree attention: a window needs the positions of the keys");
  check_vector(position, ScalarType::Long, shape.keys, "position");
  check_vector(sinks, ScalarType::Float, shape.heads, "sinks");
  return {data_ptr<int64_t>(position), window, static_cast<float>(softcap), data_ptr<float>(sinks)};
}

bool tree_attention_ready(ScalarType type) { return ready(type); }

// out [1, Hq, T, D] and lse [2, Hq, T] (log-sum-exp in base 2, in two terms) ← attention of q [1, Hq, T, D] to k and v
// [1, Hkv, S + T, D], the last T of which are those of the rows themselves. Row i sees key k if k ≤ S + i < end[k], and if
// position[S + i] − position[k] < window. softcap, sinks [Hq]: see ScoreRule.
void tree_attention_forward(const Tensor q, const Tensor k, const Tensor v, const Tensor end, double scale, Tensor out,
                            Tensor lse, std::optional<Tensor> position, int64_t window, double softcap,
                            std::optional<Tensor> sinks) {
  const AttentionShape shape = check_shape(q, k, v, end, scale);
  const ScoreRule rule = check_rule(position, window, softcap, sinks, shape);
  check_heads(out, q.scalar_type(), shape.heads, shape.rows, shape.head_dim, "out");
  check_lse(lse, shape);
#ifdef __AVX512F__
  dispatch(q.scalar_type(), [&]<typename T>(T) {
    Forward<T>{inputs<T>(q, k, v, end, shape, rule), head_view<T>(out), data_ptr<float>(lse)}.run();
  });
#endif
}

// dq, dk and dv, overwritten, from d_out and the inputs and outputs of the forward pass. work: fp32 [Hq, T rounded
// up to tiles of 64, D + 3], overwritten; see BackwardWorkspace.
void tree_attention_backward(const Tensor d_out, const Tensor q, const Tensor k, const Tensor v, const Tensor end,
                             double scale, const Tensor out, const Tensor lse, Tensor work, Tensor dq, Tensor dk,
                             Tensor dv, std::optional<Tensor> position, int64_t window, double softcap) {
  const AttentionShape shape = check_shape(q, k, v, end, scale);
  // the log-sum-exp has the sinks already
  const ScoreRule rule = check_rule(position, window, softcap, std::nullopt, shape);
  const ScalarType type = q.scalar_type();
  check_heads(d_out, type, shape.heads, shape.rows, shape.head_dim, "d_out");
  check_heads(out, type, shape.heads, shape.rows, shape.head_dim, "out");
  check_heads(dq, type, shape.heads, shape.rows, shape.head_dim, "dq");
  check_heads(dk, type, shape.kv_heads, shape.keys, shape.head_dim, "dk");
  check_heads(dv, type, shape.kv_heads, shape.keys, shape.head_dim, "dv");
  check_lse(lse, shape);
  STD_TORCH_CHECK(work.scalar_type() == ScalarType::Float && work.is_contiguous(),
                  "tree attention: work must be contiguous fp32");
#ifdef __AVX512F__
  const int64_t capacity = work.numel() * static_cast<int64_t>(sizeof(float)), needed = BackwardWorkspace::bytes(shape);
  STD_TORCH_CHECK(capacity >= needed, "tree attention: work has ", capacity, " bytes, ", needed,
                  " are needed: fp32 [heads, rows rounded up to 64, head_dim + 3]");
  ScratchArena arena(work.data_ptr(), capacity);
  const auto workspace = BackwardWorkspace::layout(arena, shape);
  dispatch(type, [&]<typename T>(T) {
    Backward<T>{inputs<T>(q, k, v, end, shape, rule),
                {head_view<const T>(out), head_view<const T>(d_out), data_ptr<float>(lse), head_view<T>(dq),
                 head_view<T>(dk), head_view<T>(dv)},
                workspace}
        .run();
  });
#endif
}

}  // namespace
}  // namespace pact_fast::attention

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("tree_attention_ready(ScalarType dtype) -> bool");
  m.def(
      "tree_attention_forward(Tensor q, Tensor k, Tensor v, Tensor end, float scale, Tensor(a!) out, Tensor(b!) lse, "
      "Tensor? position=None, int window=0, float softcap=0.0, Tensor? sinks=None) -> ()");
  m.def(
      "tree_attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor end, float scale, Tensor out, "
      "Tensor lse, Tensor(a!) work, Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv, Tensor? position=None, int window=0, "
      "float softcap=0.0) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("tree_attention_ready", TORCH_BOX(&pact_fast::attention::tree_attention_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("tree_attention_forward", TORCH_BOX(&pact_fast::attention::tree_attention_forward));
  m.impl("tree_attention_backward", TORCH_BOX(&pact_fast::attention::tree_attention_backward));
}
