// Backward pass of tree attention on CPU, with delta = Σ dO∘O:
//
//     dPᵀ = V·dOᵀ, dSᵀ = Pᵀ∘(dPᵀ − delta), dV += Pᵀ·dO, dK += dSᵀ·Q, dQᵀ += Kᵀ·dSᵀ

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#include "attention_mask.h"
#include "attention_tiles.h"
#include "common/brgemm.h"
#include "common/exp.h"
#include "common/parallel.h"

namespace pact_fast::attention {

template <typename T>
struct AttentionGrads {
  HeadView<const T> out, d_out;
  const float* lse;  // [2, heads, rows], see Forward
  HeadView<T> dq, dk, dv;
};

// fp32 values of each head's rows, padded to whole tiles, that outlive a unit of work. The caller allocates them.
struct BackwardWorkspace {
  float* dq;                       // dQᵀ by tiles [head_dim, kTile]
  float *shift, *log_sum, *delta;  // both terms of log-sum-exp, Σ dO∘O

  static BackwardWorkspace layout(ScratchArena& arena, const AttentionShape& shape) {
    const int64_t rows = shape.heads * shape.padded_rows();
    return {.dq = arena.take<float>(/* dq */ rows * shape.head_dim),
            .shift = arena.take<float>(/* shift */ rows),
            .log_sum = arena.take<float>(/* log_sum */ rows),
            .delta = arena.take<float>(/* delta */ rows)};
  }

  static int64_t bytes(const AttentionShape& shape) {
    return scratch_bytes([&](ScratchArena& arena) { return layout(arena, shape); });
  }
};

// Pᵀ and dSᵀ of a tile as A, dSᵀ as B as well. In fp32 both layouts are the same, and ds_b is ds. If `capped`, scores
// are those of cap_scores, and inner = scale / softcap gives the tanh in them, whose derivative is 1 − tanh².
template <bool masked, bool capped, typename T>
void softmax_backward_tile(const float* scores, const float* dp, const uint64_t* row_bits, float c, float inner,
                           const float* shift, const float* log_sum, const float* delta, T* p, T* ds, T* ds_b) {
  const __m512 factor = _mm512_set1_ps(c), one = _mm512_set1_ps(1.0f);
  const auto capped_slope = [&](int64_t at) {
    const __m512 tanh = _mm512_mul_ps(loadu(scores + at), _mm512_set1_ps(inner));
    return _mm512_fnmadd_ps(tanh, tanh, one);
  };
  for (int64_t r = 0; r < kTile; r += 16) {
    const __m512 shifts = loadu(shift + r), log_sums = loadu(log_sum + r), deltas = loadu(delta + r);
    const auto probability = [&](int64_t at) {
      return exp2_for<T>(_mm512_sub_ps(_mm512_fmsub_ps(loadu(scores + at), factor, shifts), log_sums));
    };
    for (int64_t k = 0; k < kTile; k += 2) {
      const int64_t at = k * kTile + r, next = at + kTile;
      __m512 p_x = probability(at), p_y = probability(next);
      __m512 ds_x = _mm512_mul_ps(p_x, _mm512_sub_ps(loadu(dp + at), deltas));
      __m512 ds_y = _mm512_mul_ps(p_y, _mm512_sub_ps(loadu(dp + next), deltas));
      if constexpr (capped) {
        ds_x = _mm512_mul_ps(ds_x, capped_slope(at));
        ds_y = _mm512_mul_ps(ds_y, capped_slope(next));
      }
      if constexpr (masked) {
        const auto mask_x = static_cast<__mmask16>(row_bits[k] >> r);
        const auto mask_y = static_cast<__mmask16>(row_bits[k + 1] >> r);
        p_x = _mm512_maskz_mov_ps(mask_x, p_x), ds_x = _mm512_maskz_mov_ps(mask_x, ds_x);
        p_y = _mm512_maskz_mov_ps(mask_y, p_y), ds_y = _mm512_maskz_mov_ps(mask_y, ds_y);
      }
      store_a(p + at, p_x, p_y);
      store_a(ds + at, ds_x, ds_y);
      if constexpr (sizeof(T) == 2) store_b(ds_b, k, r, ds_x, ds_y);
    }
  }
}

template <typename T>
struct Backward {
  const AttentionInputs<T>& in;
  const AttentionGrads<T>& grads;
  const BackwardWorkspace work;

  const AttentionShape& shape = in.shape;
  const int64_t head_dim = shape.head_dim, tiles = unit_tiles(head_dim);
  const TreeMask mask{in.end, shape, in.rule};
  const int64_t row_tiles = mask.row_tiles(), key_blocks = ceil_div(mask.key_tiles(), tiles);
  const int64_t heads_per_kv_head = shape.heads / shape.kv_heads;
  // Many units add to the dQ of a tile of rows, in the order of their blocks of keys, so that sums do not depend on
  // the schedule: tickets[block, row tile] is the number of blocks before it, now_serving[head, row tile] of those
  // that are done.
  std::vector<int32_t> tickets = std::vector<int32_t>(key_blocks * row_tiles);
  std::unique_ptr<std::atomic<int32_t>[]> now_serving =
      std::make_unique<std::atomic<int32_t>[]>(shape.heads * row_tiles);
  FirstError error = {};

  // A unit's tiles of keys and, one after the other, the tiles of rows that see them. A and B: operands of BRGEMM.
  struct Scratch {
    T *k, *v, *k_transposed;                      // A [tiles·kTile, head_dim], the same, and [head_dim, tiles·kTile]
    float *dk, *dv;                               // [tiles·kTile, head_dim]
    T *q_transposed, *q, *do_transposed, *d_out;  // B
    T *p, *ds;                                    // A, of one tile of scores
    T* ds_b;                                      // B, of all tiles of keys
    float *scores, *dp;
    int64_t first, last;  // tiles of keys
  };

  Scratch layout(ScratchArena& arena) const {
    const int64_t unit = tiles * kTile * head_dim, one = kTile * head_dim;
    return {.k = arena.take<T>(/* A, K */ unit),
            .v = arena.take<T>(/* A, V */ unit),
            .k_transposed = arena.take<T>(/* A, Kᵀ */ unit),
            .dk = arena.take<float>(/* dK */ unit),
            .dv = arena.take<float>(/* dV */ unit),
            .q_transposed = arena.take<T>(/* B, Qᵀ */ one),
            .q = arena.take<T>(/* B, Q */ one),
            .do_transposed = arena.take<T>(/* B, dOᵀ */ one),
            .d_out = arena.take<T>(/* B, dO */ one),
            .p = arena.take<T>(/* A, Pᵀ */ kScores),
            .ds = arena.take<T>(/* A, dSᵀ */ kScores),
            .ds_b = arena.take<T>(/* B, dSᵀ */ tiles * kScores),
            .scores = arena.take<float>(/* Sᵀ */ kScores),
            .dp = arena.take<float>(/* dPᵀ */ kScores),
            .first = 0,
            .last = 0};
  }

  void run() {
    for (int64_t b = 1; b < key_blocks; ++b) {
      for (int64_t t = 0; t < row_tiles; ++t) {
        tickets[b * row_tiles + t] = tickets[(b - 1) * row_tiles + t] + any_visible(b - 1, t);
      }
    }
    parallel_for_dynamic(shape.heads * row_tiles, [&](int64_t u) { prepare_rows(u / row_tiles, u % row_tiles); });
    // A unit waits only for units of smaller number, which started before it.
    parallel_for_dynamic<AmxTileGuard>(
        key_blocks * shape.kv_heads, [&](ScratchArena& arena) { return layout(arena); },
        [&](int64_t u, Scratch& scratch) { unit(u % shape.kv_heads, u / shape.kv_heads, scratch); }, error);
    parallel_for_dynamic(shape.heads * row_tiles, [&](int64_t u) { write_dq(u / row_tiles, u % row_tiles); });
  }

  int64_t row_count(int64_t t) const { return std::min(kTile, shape.rows - t * kTile); }
  int64_t key_count(int64_t k) const { return std::min(kTile, shape.keys - k * kTile); }

  float* dq_tile(int64_t head, int64_t t) const {
    return work.dq + (head * shape.padded_rows() + t * kTile) * head_dim;
  }

  bool any_visible(int64_t block, int64_t t) const {
    for (int64_t k = block * tiles; k < std::min((block + 1) * tiles, mask.key_tiles()); ++k) {
      if (mask.any_visible(k, t)) return true;
    }
    return false;
  }

  // Log-sum-exp and delta of a tile of rows, zeros beyond the last row.
  void prepare_rows(int64_t head, int64_t t) {
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t row = t * kTile + r, at = head * shape.padded_rows() + row;
      const bool is_row = row < shape.rows;
      work.shift[at] = is_row ? grads.lse[head * shape.rows + row] : 0.0f;
      work.log_sum[at] = is_row ? grads.lse[(shape.heads + head) * shape.rows + row] : 0.0f;
      work.delta[at] = 0.0f;
      if (!is_row) continue;
      const T *out = grads.out.at(head, row), *d_out = grads.d_out.at(head, row);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < head_dim; d += 16) sum = _mm512_fmadd_ps(loadu(out + d), loadu(d_out + d), sum);
      work.delta[at] = _mm512_reduce_add_ps(sum);
    }
  }

  // A block of keys of one head of keys, for all heads of queries that share it.
  void unit(int64_t kv_head, int64_t block, Scratch& s) {
    load_keys(s, kv_head, block);
    for (int64_t head = kv_head * heads_per_kv_head; head < (kv_head + 1) * heads_per_kv_head; ++head) {
      for (int64_t t = 0; t < row_tiles; ++t) {
        if (!any_visible(block, t)) continue;
        load_rows(s, head, t);
        prefetch_rows(dq_tile(head, t), kTile, head_dim, kTile);
        if (t + 1 < row_tiles) {
          const int64_t next = (t + 1) * kTile;
          prefetch_rows(in.q.at(head, next), in.q.row_stride, row_count(t + 1), head_dim);
          prefetch_rows(grads.d_out.at(head, next), grads.d_out.row_stride, row_count(t + 1), head_dim);
        }
        for (int64_t k = s.first; k < s.last; ++k) tile(s, head, k, t);
        accumulate_dq(s, head, block, t);
      }
    }
    for (int64_t k = s.first; k < s.last; ++k) {
      const int64_t at = (k - s.first) * kTile * head_dim;
      write_scaled(s.dk + at, shape.scale, key_count(k), grads.dk.at(kv_head, k * kTile), grads.dk.row_stride);
      write_scaled(s.dv + at, 1.0f, key_count(k), grads.dv.at(kv_head, k * kTile), grads.dv.row_stride);
    }
  }

  void load_keys(Scratch& s, int64_t kv_head, int64_t block) const {
    s.first = block * tiles, s.last = std::min((block + 1) * tiles, mask.key_tiles());
    for (float* sums : {s.dk, s.dv}) std::fill_n(sums, tiles * kTile * head_dim, 0.0f);
    for (int64_t k = s.first; k < s.last; ++k) {
      const int64_t at = (k - s.first) * kTile;
      pack_a(in.k.at(kv_head, k * kTile), in.k.row_stride, key_count(k), head_dim, s.k + at * head_dim);
      pack_a(in.v.at(kv_head, k * kTile), in.v.row_stride, key_count(k), head_dim, s.v + at * head_dim);
      pack_b(in.k.at(kv_head, k * kTile), in.k.row_stride, key_count(k), head_dim, s.q);  // q is not loaded yet
      transpose_packed_b(s.q, head_dim, s.k_transposed + at, tiles * kTile);
    }
  }

  void load_rows(const Scratch& s, int64_t head, int64_t t) const {
    const T *q = in.q.at(head, t * kTile), *d_out = grads.d_out.at(head, t * kTile);
    pack_b_transposed(q, in.q.row_stride, row_count(t), head_dim, s.q_transposed);
    pack_b(q, in.q.row_stride, row_count(t), head_dim, s.q);
    pack_b_transposed(d_out, grads.d_out.row_stride, row_count(t), head_dim, s.do_transposed);
    pack_b(d_out, grads.d_out.row_stride, row_count(t), head_dim, s.d_out);
  }

  // One tile of scores: adds to dK and dV, leaves dSᵀ for dQ.
  void tile(const Scratch& s, int64_t head, int64_t k, int64_t t) const {
    const int64_t at = (k - s.first) * kTile * head_dim, row = head * shape.padded_rows() + t * kTile;
    T* ds_b = s.ds_b + (k - s.first) * kScores;
    T* ds = sizeof(T) == 2 ? s.ds : ds_b;
    if (!mask.any_visible(k, t)) {
      std::fill_n(ds_b, kScores, T{});
      return;
    }
    brgemm(kTile, kTile, head_dim, s.k + at, head_dim, s.q_transposed, kTile, s.scores, kTile, false);
    brgemm(kTile, kTile, head_dim, s.v + at, head_dim, s.do_transposed, kTile, s.dp, kTile, false);
    const float c = shape.scale * kLog2E, softcap = in.rule.softcap, inner = softcap > 0 ? shape.scale / softcap : 0;
    if (softcap > 0) cap_scores(s.scores, shape.scale, softcap);
    const float *shift = work.shift + row, *log_sum = work.log_sum + row, *delta = work.delta + row;
    uint64_t row_bits[kTile];
    const bool masked = !mask.all_visible(k, t);
    if (masked) mask.row_bits(k, t, row_bits);
    const auto backward = [&]<bool is_masked, bool is_capped>() {
      softmax_backward_tile<is_masked, is_capped>(s.scores, s.dp, row_bits, c, inner, shift, log_sum, delta, s.p, ds,
                                                  ds_b);
    };
    if (softcap > 0) {
      masked ? backward.template operator()<true, true>() : backward.template operator()<false, true>();
    } else {
      masked ? backward.template operator()<true, false>() : backward.template operator()<false, false>();
    }
    brgemm(kTile, head_dim, kTile, s.p, kTile, s.d_out, head_dim, s.dv + at, head_dim, true);
    brgemm(kTile, head_dim, kTile, ds, kTile, s.q, head_dim, s.dk + at, head_dim, true);
  }

  // dQᵀ of a tile of rows, after the blocks of keys before this one have added theirs.
  void accumulate_dq(const Scratch& s, int64_t head, int64_t block, int64_t t) {
    const int32_t ticket = tickets[block * row_tiles + t];
    std::atomic<int32_t>& serving = now_serving[head * row_tiles + t];
    while (serving.load(std::memory_order_acquire) != ticket) {
      if (error.raised()) throw std::runtime_error("pact_fast: stopped, another unit of work failed");
      std::this_thread::yield();
    }
    brgemm(head_dim, kTile, (s.last - s.first) * kTile, s.k_transposed, tiles * kTile, s.ds_b, kTile, dq_tile(head, t),
           kTile, ticket > 0);
    serving.store(ticket + 1, std::memory_order_release);
  }

  void write_scaled(const float* sums, float factor, int64_t rows, T* to, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < head_dim; d += 16) {
        storeu(to + i * ld + d, _mm512_mul_ps(loadu(sums + i * head_dim + d), _mm512_set1_ps(factor)));
      }
    }
  }

  void write_dq(int64_t head, int64_t t) const {
    float factor[kTile];
    std::fill_n(factor, kTile, shape.scale);
    untranspose_scaled(dq_tile(head, t), factor, row_count(t), head_dim, grads.dq.at(head, t * kTile),
                       grads.dq.row_stride);
  }
};

}  // namespace pact_fast::attention
