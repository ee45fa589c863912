// Forward pass of tree attention on CPU: Sᵀ = K·Qᵀ, Pᵀ = exp(scale·Sᵀ − lse), Oᵀ += Vᵀ·Pᵀ, with online softmax.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention_mask.h"
#include "attention_tiles.h"
#include "common/brgemm.h"
#include "common/exp.h"
#include "common/parallel.h"

namespace pact_fast::attention {

// Of each row: the largest score so far, shift = c·max, and Σ exp2(c·score − shift), c = scale·log2(e).
struct RunningSoftmax {
  float max[kTile], shift[kTile], sum[kTile];
};

// Pᵀ of a tile as B, and the running softmax of its rows. rescale [kTile]: the factor from the old maximum to the
// new one. row_bits: see TreeMask, read if `masked`.
template <bool masked, typename T>
void softmax_tile(const float* scores, const uint64_t* row_bits, float c, RunningSoftmax& running, float* rescale,
                  T* p) {
  const __m512 factor = _mm512_set1_ps(c);
  for (int64_t r = 0; r < kTile; r += 16) {
    __m512 max = loadu(running.max + r);
    for (int64_t k = 0; k < kTile; ++k) {
      const auto mask = static_cast<__mmask16>(masked ? row_bits[k] >> r : 0xffff);
      max = _mm512_mask_max_ps(max, mask, loadu(scores + k * kTile + r), max);
    }
    // The difference of the rounded shifts, which the exponentials had: c·(old − new) is another one where scores
    // are large.
    const __m512 shift = _mm512_mul_ps(max, factor),
                 decay = exp2_for<T>(_mm512_sub_ps(loadu(running.shift + r), shift));
    __m512 sum = _mm512_mul_ps(loadu(running.sum + r), decay);
    for (int64_t k = 0; k < kTile; k += 2) {
      __m512 x = exp2_for<T>(_mm512_fmsub_ps(loadu(scores + k * kTile + r), factor, shift));
      __m512 y = exp2_for<T>(_mm512_fmsub_ps(loadu(scores + (k + 1) * kTile + r), factor, shift));
      if constexpr (masked) {
        x = _mm512_maskz_mov_ps(static_cast<__mmask16>(row_bits[k] >> r), x);
        y = _mm512_maskz_mov_ps(static_cast<__mmask16>(row_bits[k + 1] >> r), y);
      }
      sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
      store_b(p, k, r, x, y);
    }
    storeu(running.max + r, max);
    storeu(running.shift + r, shift);
    storeu(running.sum + r, sum);
    storeu(rescale + r, decay);
  }
}

// Oᵀ [head_dim, kTile] ← Oᵀ·rescale, skipped where all factors are 1.
inline void rescale_output(float* out, const float* rescale, int64_t head_dim) {
  if (std::all_of(rescale, rescale + kTile, [](float x) { return x == 1.0f; })) return;
  for (int64_t r = 0; r < kTile; r += 16) {
    const __m512 factor = loadu(rescale + r);
    for (int64_t d = 0; d < head_dim; ++d)
      storeu(out + d * kTile + r, _mm512_mul_ps(loadu(out + d * kTile + r), factor));
  }
}

template <typename T>
struct Forward {
  const AttentionInputs<T>& in;
  HeadView<T> out;
  // [2, heads, rows]: shift and log2(sum) of each row, log-sum-exp in base 2 in two terms. One rounded sum of both
  // would lose digits where scores are large; the shift alone does not, the backward pass subtracts it as the
  // forward pass did.
  float* lse;

  const AttentionShape& shape = in.shape;
  const int64_t head_dim = shape.head_dim, tiles = unit_tiles(head_dim);
  const float c = shape.scale * kLog2E;
  const TreeMask mask{in.end, shape, in.rule};

  struct RowTile {
    T* q;        // B, Qᵀ [head_dim, kTile]
    float* out;  // Oᵀ [head_dim, kTile]
    RunningSoftmax* running;
  };

  struct Scratch {
    T *k, *v_packed, *v_transposed, *p;
    float* scores;
    RowTile row_tiles[kMaxUnitTiles];
  };

  Scratch layout(ScratchArena& arena) const {
    Scratch s{.k = arena.take<T>(/* A, K */ kTile * head_dim),
              .v_packed = arena.take<T>(/* B, V */ kTile * head_dim),
              .v_transposed = arena.take<T>(/* A, Vᵀ */ head_dim * kTile),
              .p = arena.take<T>(/* B, Pᵀ */ kScores),
              .scores = arena.take<float>(/* Sᵀ */ kScores),
              .row_tiles = {}};
    for (int64_t t = 0; t < tiles; ++t) {
      s.row_tiles[t] = {.q = arena.take<T>(/* B, Qᵀ */ head_dim * kTile),
                        .out = arena.take<float>(/* Oᵀ */ head_dim * kTile),
                        .running = arena.take<RunningSoftmax>(1)};
    }
    return s;
  }

  void run() {
    const int64_t blocks = ceil_div(mask.row_tiles(), tiles);
    parallel_for_dynamic<AmxTileGuard>(
        blocks * shape.heads, [&](ScratchArena& arena) { return layout(arena); },
        [&](int64_t u, Scratch& scratch) {
          unit(u % shape.heads, blocks - 1 - u / shape.heads, scratch);  // the last rows first: they see the most keys
        });
  }

  // The block of row tiles of one head.
  void unit(int64_t head, int64_t block, Scratch& s) const {
    const int64_t first = block * tiles, last = std::min(first + tiles, mask.row_tiles());
    const int64_t kv_head = head / (shape.heads / shape.kv_heads);
    for (int64_t t = first; t < last; ++t) init_rows(s.row_tiles[t - first], head, t);
    for (int64_t k = 0; k < mask.key_tiles(); ++k) {
      bool packed = false;
      for (int64_t t = first; t < last; ++t) {
        if (!mask.any_visible(k, t)) continue;
        if (!packed) pack_keys(s, kv_head, k);
        packed = true;
        tile(s, s.row_tiles[t - first], k, t);
      }
    }
    for (int64_t t = first; t < last; ++t) write_rows(s.row_tiles[t - first], head, t);
  }

  int64_t row_count(int64_t t) const { return std::min(kTile, shape.rows - t * kTile); }

  void init_rows(const RowTile& rows, int64_t head, int64_t t) const {
    std::fill_n(rows.out, head_dim * kTile, 0.0f);
    std::fill_n(rows.running->max, kTile, kMaskedScore);
    std::fill_n(rows.running->shift, kTile, kMaskedScore * c);
    std::fill_n(rows.running->sum, kTile, 0.0f);
    if (in.rule.sinks != nullptr) init_sink(*rows.running, in.rule.sinks[head]);
    pack_b_transposed(in.q.at(head, t * kTile), in.q.row_stride, row_count(t), head_dim, rows.q);
  }

  // The sink is a score that the row has seen already, of a key without a value.
  void init_sink(RunningSoftmax& running, float sink) const {
    const float max = sink / shape.scale, shift = max * c;
    std::fill_n(running.max, kTile, max);
    std::fill_n(running.shift, kTile, shift);
    std::fill_n(running.sum, kTile, std::exp2(sink * kLog2E - shift));
  }

  void pack_keys(const Scratch& s, int64_t kv_head, int64_t k) const {
    const int64_t count = std::min(kTile, shape.keys - k * kTile);
    pack_a(in.k.at(kv_head, k * kTile), in.k.row_stride, count, head_dim, s.k);
    pack_b(in.v.at(kv_head, k * kTile), in.v.row_stride, count, head_dim, s.v_packed);
    transpose_packed_b(s.v_packed, head_dim, s.v_transposed, kTile);
  }

  // One tile of scores: Sᵀ = K·Qᵀ, Pᵀ, Oᵀ += Vᵀ·Pᵀ.
  void tile(const Scratch& s, const RowTile& rows, int64_t k, int64_t t) const {
    float rescale[kTile];
    brgemm(kTile, kTile, head_dim, s.k, head_dim, rows.q, kTile, s.scores, kTile, false);
    if (in.rule.softcap > 0) cap_scores(s.scores, shape.scale, in.rule.softcap);
    if (mask.all_visible(k, t)) {
      softmax_tile<false>(s.scores, nullptr, c, *rows.running, rescale, s.p);
    } else {
      uint64_t row_bits[kTile];
      mask.row_bits(k, t, row_bits);
      softmax_tile<true>(s.scores, row_bits, c, *rows.running, rescale, s.p);
    }
    rescale_output(rows.out, rescale, head_dim);
    brgemm(head_dim, kTile, kTile, s.v_transposed, kTile, s.p, kTile, rows.out, kTile, true);
  }

  void write_rows(const RowTile& rows, int64_t head, int64_t t) const {
    float inverse_sum[kTile];
    for (int64_t r = 0; r < kTile; ++r) inverse_sum[r] = 1.0f / rows.running->sum[r];
    untranspose_scaled(rows.out, inverse_sum, row_count(t), head_dim, out.at(head, t * kTile), out.row_stride);
    for (int64_t r = 0; r < row_count(t); ++r) {
      const int64_t row = head * shape.rows + t * kTile + r;
      lse[row] = rows.running->shift[r];
      lse[shape.heads * shape.rows + row] = std::log2(rows.running->sum[r]);
    }
  }
};

}  // namespace pact_fast::attention
