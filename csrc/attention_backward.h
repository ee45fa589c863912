// The backward pass of tree attention on CPU: dPᵀ = V·dOᵀ, dSᵀ = Pᵀ∘(dPᵀ − Σ dO∘O), dV += Pᵀ·dO, dK += dSᵀ·Q, dQᵀ += Kᵀ·dSᵀ.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "attention_tiles.h"
#include "attention_views.h"
#include "brgemm.h"
#include "work.h"

namespace pact_fast::attention {

template <typename T>
struct Grads {
  Heads<const T> out, d_out;
  const float* lse;  // [2, heads, rows], see Forward
  float* work;       // [heads, rows up to whole tiles, width + 3]
  Heads<T> dq, dk, dv;
};

// Pᵀ and dSᵀ of a tile as A, dSᵀ as B. In fp32 these are the same, and ds_pairs is ds.
template <bool masked, typename T>
void differentiate(const float* scores, const float* dp, const uint64_t* seen, float c, const float* shift,
                   const float* log_sum, const float* mean, T* p, T* ds, T* ds_pairs) {
  const __m512 factor = _mm512_set1_ps(c);
  for (int64_t g = 0; g < kTile; g += 16) {
    const __m512 shifts = load(shift + g), log_sums = load(log_sum + g), less = load(mean + g);
    const auto term = [&](int64_t at) {
      return exp2<T>(_mm512_sub_ps(_mm512_fmsub_ps(load(scores + at), factor, shifts), log_sums));
    };
    for (int64_t k = 0; k < kTile; k += 2) {
      const int64_t at = k * kTile + g, next = at + kTile;
      __m512 p_x = term(at), p_y = term(next);
      __m512 ds_x = _mm512_mul_ps(p_x, _mm512_sub_ps(load(dp + at), less));
      __m512 ds_y = _mm512_mul_ps(p_y, _mm512_sub_ps(load(dp + next), less));
      if constexpr (masked) {
        const auto mask_x = static_cast<__mmask16>(seen[k] >> g), mask_y = static_cast<__mmask16>(seen[k + 1] >> g);
        p_x = _mm512_maskz_mov_ps(mask_x, p_x), ds_x = _mm512_maskz_mov_ps(mask_x, ds_x);
        p_y = _mm512_maskz_mov_ps(mask_y, p_y), ds_y = _mm512_maskz_mov_ps(mask_y, ds_y);
      }
      store_rows(p + at, p_x, p_y);
      store_rows(ds + at, ds_x, ds_y);
      if constexpr (sizeof(T) == 2) store_pairs(ds_pairs, k, g, ds_x, ds_y);
    }
  }
}

template <typename T>
struct Backward {
  const Inputs<T>& in;
  const Grads<T>& grads;

  const Sizes& size = in.size;
  const int64_t width = size.width, tiles = owned(width);
  const Mask mask{in.end, size};
  const int64_t row_tiles = mask.row_tiles(), padded = row_tiles * kTile, shared = size.heads / size.groups;
  // of each head's rows, up to whole tiles: dQᵀ in tiles [width, kTile], both parts of log-sum-exp, Σ dO∘O
  float *const dq = grads.work, *const shift = dq + size.heads * padded * width;
  float *const log_sum = shift + size.heads * padded, *const mean = log_sum + size.heads * padded;
  std::vector<int32_t> turns = std::vector<int32_t>(ceil_div(mask.key_tiles(), tiles) * row_tiles);
  std::unique_ptr<std::atomic<int32_t>[]> taken = std::make_unique<std::atomic<int32_t>[]>(size.heads * row_tiles);

  void run() {
    const int64_t blocks = ceil_div(mask.key_tiles(), tiles);
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t t = 0; t < row_tiles; ++t) {  // how many blocks come first
        turns[b * row_tiles + t] = b == 0 ? 0 : turns[(b - 1) * row_tiles + t] + sees(b - 1, t);
      }
    }
    share<char>(size.heads * row_tiles, 0, [&](int64_t u, char*) { prepare(u / row_tiles, u % row_tiles); });
    const int64_t scratch = tiles * kTile * width * (4 * sizeof(T) + 8) + 4 * kTile * width * sizeof(T) +
                            kScores * (8 + 2 * sizeof(T) + tiles * sizeof(T)) + 64 * kTile;
    // a unit waits only for units of smaller number, which have been started before it
    share<char, pact_fast::Tiles>(blocks * size.groups, scratch, [&](int64_t u, char* mine) {
      unit(u % size.groups, u / size.groups, Pieces(mine));
    });
    share<char>(size.heads * row_tiles, 0, [&](int64_t u, char*) { finish(u / row_tiles, u % row_tiles); });
  }

  int64_t count(int64_t t) const { return std::min(kTile, size.rows - t * kTile); }

  float* dq_of(int64_t head, int64_t t) const { return dq + (head * padded + t * kTile) * width; }

  bool sees(int64_t block, int64_t t) const {
    for (int64_t k = block * tiles; k < std::min((block + 1) * tiles, mask.key_tiles()); ++k) {
      if (mask.some(k, t)) return true;
    }
    return false;
  }

  void prepare(int64_t head, int64_t t) {
    for (int64_t r = 0; r < kTile; ++r) {
      const int64_t row = t * kTile + r, at = head * padded + row;
      const bool real = row < size.rows;
      shift[at] = real ? grads.lse[head * size.rows + row] : 0.0f;
      log_sum[at] = real ? grads.lse[(size.heads + head) * size.rows + row] : 0.0f;
      mean[at] = 0.0f;
      if (!real) continue;
      const T *out = grads.out.at(head, row), *d_out = grads.d_out.at(head, row);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < width; d += 16) sum = _mm512_fmadd_ps(load(out + d), load(d_out + d), sum);
      mean[at] = _mm512_reduce_add_ps(sum);
    }
  }

  // What a unit works with: its keys, and the tile of rows that passes.
  struct Tiles {
    int64_t first, last;       // tiles of keys
    T *k, *v, *k_turned;        // [tiles·kTile, width] as A, twice, and [width, tiles·kTile]
    float *dk, *dv;             // [tiles·kTile, width]
    T *q_turned, *q, *d_out_turned, *d_out;  // as B
    T *p, *ds, *ds_pairs;       // of one tile, of one, and of all tiles of keys
    float *scores, *dp;
  };

  void unit(int64_t group, int64_t block, Pieces mine) {
    const Tiles u = load_keys(group, block, mine);
    for (int64_t head = group * shared; head < (group + 1) * shared; ++head) {
      for (int64_t t = 0; t < row_tiles; ++t) {
        if (!sees(block, t)) continue;
        load_rows(u, head, t);
        fetch(dq_of(head, t), kTile, width, kTile);
        if (t + 1 < row_tiles) {
          fetch(in.q.at(head, (t + 1) * kTile), in.q.row, count(t + 1), width);
          fetch(grads.d_out.at(head, (t + 1) * kTile), grads.d_out.row, count(t + 1), width);
        }
        for (int64_t k = u.first; k < u.last; ++k) tile(u, head, k, t);
        add_to_rows(u, head, block, t);
      }
    }
    for (int64_t k = u.first; k < u.last; ++k) {
      const int64_t keys = std::min(kTile, size.keys - k * kTile), at = (k - u.first) * kTile * width;
      write(u.dk + at, size.scale, keys, grads.dk.at(group, k * kTile), grads.dk.row);
      write(u.dv + at, 1.0f, keys, grads.dv.at(group, k * kTile), grads.dv.row);
    }
  }

  Tiles load_keys(int64_t group, int64_t block, Pieces& mine) const {
    Tiles u{block * tiles, std::min((block + 1) * tiles, mask.key_tiles())};
    const int64_t all = tiles * kTile * width, one = kTile * width;
    for (T** p : {&u.k, &u.v, &u.k_turned}) *p = mine.take<T>(all);
    for (float** p : {&u.dk, &u.dv}) std::fill_n(*p = mine.take<float>(all), all, 0.0f);
    for (T** p : {&u.q_turned, &u.q, &u.d_out_turned, &u.d_out}) *p = mine.take<T>(one);
    u.p = mine.take<T>(kScores);
    u.ds = mine.take<T>(kScores);
    u.ds_pairs = mine.take<T>(tiles * kScores);
    u.scores = mine.take<float>(kScores);
    u.dp = mine.take<float>(kScores);
    for (int64_t k = u.first; k < u.last; ++k) {
      const int64_t keys = std::min(kTile, size.keys - k * kTile), at = (k - u.first) * kTile;
      pack_rows(in.k.at(group, k * kTile), in.k.row, keys, width, u.k + at * width);
      pack_rows(in.v.at(group, k * kTile), in.v.row, keys, width, u.v + at * width);
      pair(in.k.at(group, k * kTile), in.k.row, keys, width, u.q);
      turn_paired(u.q, width, u.k_turned + at, tiles * kTile);
    }
    return u;
  }

  void load_rows(const Tiles& u, int64_t head, int64_t t) const {
    const T *q = in.q.at(head, t * kTile), *d_out = grads.d_out.at(head, t * kTile);
    pack_turned(q, in.q.row, count(t), width, u.q_turned);
    pair(q, in.q.row, count(t), width, u.q);
    pack_turned(d_out, grads.d_out.row, count(t), width, u.d_out_turned);
    pair(d_out, grads.d_out.row, count(t), width, u.d_out);
  }

  // One tile of keys with the tile of rows: adds to dK and dV, leaves dSᵀ.
  void tile(const Tiles& u, int64_t head, int64_t k, int64_t t) const {
    const int64_t at = (k - u.first) * kTile * width, row = head * padded + t * kTile;
    T* ds_pairs = u.ds_pairs + (k - u.first) * kScores;
    T* ds = sizeof(T) == 2 ? u.ds : ds_pairs;
    if (!mask.some(k, t)) {
      std::fill_n(ds_pairs, kScores, T{});
      return;
    }
    brgemm(kTile, kTile, width, u.k + at, width, u.q_turned, kTile, u.scores, kTile, false);
    brgemm(kTile, kTile, width, u.v + at, width, u.d_out_turned, kTile, u.dp, kTile, false);
    const float c = size.scale * kLog2E;
    if (mask.all(k, t)) {
      differentiate<false>(u.scores, u.dp, nullptr, c, shift + row, log_sum + row, mean + row, u.p, ds, ds_pairs);
    } else {
      uint64_t seen[kTile];
      mask.write(k, t, seen);
      differentiate<true>(u.scores, u.dp, seen, c, shift + row, log_sum + row, mean + row, u.p, ds, ds_pairs);
    }
    brgemm(kTile, width, kTile, u.p, kTile, u.d_out, width, u.dv + at, width, true);
    brgemm(kTile, width, kTile, ds, kTile, u.q, width, u.dk + at, width, true);
  }

  // dQᵀ of the tile of rows, when those before have added theirs.
  void add_to_rows(const Tiles& u, int64_t head, int64_t block, int64_t t) {
    const int32_t turn = turns[block * row_tiles + t];
    std::atomic<int32_t>& done = taken[head * row_tiles + t];
    while (done.load(std::memory_order_acquire) != turn) std::this_thread::yield();
    brgemm(width, kTile, (u.last - u.first) * kTile, u.k_turned, tiles * kTile, u.ds_pairs, kTile,
           dq_of(head, t), kTile, turn > 0);
    done.store(turn + 1, std::memory_order_release);
  }

  void write(const float* sums, float factor, int64_t rows, T* to, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < width; d += 16) {
        store(to + i * ld + d, _mm512_mul_ps(load(sums + i * width + d), _mm512_set1_ps(factor)));
      }
    }
  }

  void finish(int64_t head, int64_t t) const {
    float factor[kTile];
    std::fill_n(factor, kTile, size.scale);
    unturn(dq_of(head, t), factor, count(t), width, grads.dq.at(head, t * kTile), grads.dq.row);
  }
};

}  // namespace pact_fast::attention
