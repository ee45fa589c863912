// The forward pass of tree attention on CPU: Sᵀ = K·Qᵀ, Pᵀ = exp(scale·Sᵀ − lse), Oᵀ += Vᵀ·Pᵀ.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "attention_tiles.h"
#include "attention_views.h"
#include "brgemm.h"
#include "work.h"

namespace pact_fast::attention {

struct Running {
  float top[kTile], shift[kTile], sum[kTile];  // of each row: the largest score so far, c·top, Σ exp2(c·score − shift)
};

// Pᵀ of a tile as B, and the running maximum and sum of its rows; `decay` is what takes older sums to the new maximum.
template <bool masked, typename T>
void soften(const float* scores, const uint64_t* seen, float c, Running& rows, float* decay, T* p) {
  const __m512 factor = _mm512_set1_ps(c);
  for (int64_t g = 0; g < kTile; g += 16) {
    __m512 top = load(rows.top + g);
    for (int64_t k = 0; k < kTile; ++k) {
      const auto mask = static_cast<__mmask16>(masked ? seen[k] >> g : 0xffff);
      top = _mm512_mask_max_ps(top, mask, load(scores + k * kTile + g), top);
    }
    // the difference of the rounded shifts, which terms have had: c·(before − top) is another one where scores are large
    const __m512 shift = _mm512_mul_ps(top, factor), less = exp2<T>(_mm512_sub_ps(load(rows.shift + g), shift));
    __m512 sum = _mm512_mul_ps(load(rows.sum + g), less);
    for (int64_t k = 0; k < kTile; k += 2) {
      __m512 x = exp2<T>(_mm512_fmsub_ps(load(scores + k * kTile + g), factor, shift));
      __m512 y = exp2<T>(_mm512_fmsub_ps(load(scores + (k + 1) * kTile + g), factor, shift));
      if constexpr (masked) {
        x = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen[k] >> g), x);
        y = _mm512_maskz_mov_ps(static_cast<__mmask16>(seen[k + 1] >> g), y);
      }
      sum = _mm512_add_ps(sum, _mm512_add_ps(x, y));
      store_pairs(p, k, g, x, y);
    }
    store(rows.top + g, top);
    store(rows.shift + g, shift);
    store(rows.sum + g, sum);
    store(decay + g, less);
  }
}

// Oᵀ [width, kTile] ← Oᵀ·decay, unless that changes nothing.
inline void shrink(float* out, const float* decay, int64_t width) {
  if (std::all_of(decay, decay + kTile, [](float x) { return x == 1.0f; })) return;
  for (int64_t g = 0; g < kTile; g += 16) {
    const __m512 factor = load(decay + g);
    for (int64_t d = 0; d < width; ++d) store(out + d * kTile + g, _mm512_mul_ps(load(out + d * kTile + g), factor));
  }
}

template <typename T>
struct Forward {
  const Inputs<T>& in;
  Heads<T> out;
  // [2, heads, rows] shift and log2(sum) of each row: together log-sum-exp in base 2. Where scores are large, one rounded
  // number would lose digits that the shift, which is rounded as it was in the forward pass, does not.
  float* lse;

  const Sizes& size = in.size;
  const int64_t width = size.width, tiles = owned(width);
  const float c = size.scale * kLog2E;
  const Mask mask{in.end, size};

  struct RowTile {
    T* q;       // as B
    float* out;  // Oᵀ
    Running running;
  };

  void run() {
    const int64_t blocks = ceil_div(mask.row_tiles(), tiles);
    const int64_t scratch = 16 * kTile * width * sizeof(float) + 8 * kScores + 8 * sizeof(Running);
    share<char, pact_fast::Tiles>(blocks * size.heads, scratch, [&](int64_t u, char* mine) {
      unit(u % size.heads, blocks - 1 - u / size.heads, Pieces(mine));  // the last rows see most
    });
  }

  void unit(int64_t head, int64_t block, Pieces mine) const {
    const int64_t first = block * tiles, last = std::min(first + tiles, mask.row_tiles());
    const int64_t group = head / (size.heads / size.groups);
    T *keys = mine.take<T>(kTile * width), *paired = mine.take<T>(kTile * width), *values = mine.take<T>(kTile * width);
    RowTile row_tiles[4];
    for (int64_t t = first; t < last; ++t) begin(row_tiles[t - first], head, t, mine);
    for (int64_t k = 0; k < mask.key_tiles(); ++k) {
      bool packed = false;
      for (int64_t t = first; t < last; ++t) {
        if (!mask.some(k, t)) continue;
        if (!packed) {
          const int64_t count = std::min(kTile, size.keys - k * kTile);
          pack_rows(in.k.at(group, k * kTile), in.k.row, count, width, keys);
          pair(in.v.at(group, k * kTile), in.v.row, count, width, paired);
          turn_paired(paired, width, values, kTile);
          packed = true;
        }
        tile(row_tiles[t - first], keys, values, k, t, mine);
      }
    }
    for (int64_t t = first; t < last; ++t) finish(row_tiles[t - first], head, t);
  }

  int64_t count(int64_t t) const { return std::min(kTile, size.rows - t * kTile); }

  void begin(RowTile& rows, int64_t head, int64_t t, Pieces& mine) const {
    rows.q = mine.take<T>(kTile * width);
    rows.out = mine.take<float>(kTile * width);
    std::fill_n(rows.out, kTile * width, 0.0f);
    std::fill_n(rows.running.top, kTile, kNoScore);
    std::fill_n(rows.running.shift, kTile, kNoScore * c);
    std::fill_n(rows.running.sum, kTile, 0.0f);
    pack_turned(in.q.at(head, t * kTile), in.q.row, count(t), width, rows.q);
  }

  void tile(RowTile& rows, const T* keys, const T* values, int64_t k, int64_t t, Pieces mine) const {
    float *scores = mine.take<float>(kScores), decay[kTile];
    T* p = mine.take<T>(kScores);
    brgemm(kTile, kTile, width, keys, width, rows.q, kTile, scores, kTile, false);
    if (mask.all(k, t)) {
      soften<false>(scores, nullptr, c, rows.running, decay, p);
    } else {
      uint64_t seen[kTile];
      mask.write(k, t, seen);
      soften<true>(scores, seen, c, rows.running, decay, p);
    }
    shrink(rows.out, decay, width);
    brgemm(width, kTile, kTile, values, kTile, p, kTile, rows.out, kTile, true);
  }

  void finish(const RowTile& rows, int64_t head, int64_t t) const {
    float inverse[kTile];
    for (int64_t r = 0; r < kTile; ++r) inverse[r] = 1.0f / rows.running.sum[r];
    unturn(rows.out, inverse, count(t), width, out.at(head, t * kTile), out.row);
    for (int64_t r = 0; r < count(t); ++r) {
      const int64_t at = head * size.rows + t * kTile + r;
      lse[at] = rows.running.shift[r];
      lse[size.heads * size.rows + at] = std::log2(rows.running.sum[r]);
    }
  }
};

}  // namespace pact_fast::attention
