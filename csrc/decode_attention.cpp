// Attention of one new token per slot to the key-value cache of the slot, on CPUs with AVX-512: what a decoder that
// generates one token of each sequence per step needs.
//
// The time is that of reading the cache. A unit of work is a token and a head of keys: it reads the slot's keys and
// values once each, up to the token's own position and not to the longest, for all heads of queries that share them.
// Nothing depends on the other tokens, nor on the number of threads.
//
//     s = scale·K·q,   p = exp(s − max s),   out = Vᵀ·p / Σ p

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/tensor.h"

#ifdef __AVX512F__
#include "common/bf16.h"
#include "common/exp.h"
#include "common/isa.h"
#include "common/sum_lanes.h"
#endif

namespace pact_fast {
namespace {

#ifdef __AVX512F__

constexpr int64_t kKeyBlock = 256;  // terms of one running sum of values

// A cache [slots, heads, capacity, head_dim], contiguous.
template <typename T>
struct CacheView {
  T* data;
  int64_t heads, capacity, head_dim;

  T* at(int64_t slot, int64_t head) const { return data + (slot * heads + head) * capacity * head_dim; }
};

// scores[0 … 16) ← q·keys[i], i < 16; of keys from `valid` on, the last valid one is read instead.
inline void dot_16_keys(const float* q, const float* keys, int64_t head_dim, int64_t valid, float* scores) {
  const float* rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = keys + std::min<int64_t>(i, valid - 1) * head_dim;
  __m512 sums[16] = {};
  for (int64_t d = 0; d < head_dim; d += 16) {
    const __m512 x = loadu(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_fmadd_ps(x, loadu(rows[i] + d), sums[i]);
  }
  storeu(scores, sum_lanes(sums));
}

#ifdef __AVX512BF16__

inline void dot_16_keys(const bf16_t* q, const bf16_t* keys, int64_t head_dim, int64_t valid, float* scores) {
  const auto load = [](__mmask32 mask, const bf16_t* p) {
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, p));
  };
  const bf16_t* rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = keys + std::min<int64_t>(i, valid - 1) * head_dim;
  __m512 sums[16] = {};
  for (int64_t d = 0; d < head_dim; d += 32) {
    const __mmask32 mask = lane_mask32(head_dim - d);
    const __m512bh x = load(mask, q + d);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], x, load(mask, rows[i] + d));
  }
  storeu(scores, sum_lanes(sums));
}

#endif

// scores ← exp2(c·(scores − max)), 0 from `count` on; returns their sum. Room for `count` rounded up to 16.
inline float softmax_terms(float* scores, int64_t count, float c) {
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 max = least;
  for (int64_t k = 0; k < count; k += 16) {
    max = _mm512_max_ps(max, _mm512_mask_loadu_ps(least, lane_mask16(count - k), scores + k));
  }
  const __m512 factor = _mm512_set1_ps(c), shift = _mm512_set1_ps(c * _mm512_reduce_max_ps(max));
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += 16) {
    const __m512 p =
        _mm512_maskz_mov_ps(lane_mask16(count - k), exp2_for<float>(_mm512_fmsub_ps(loadu(scores + k), factor, shift)));
    storeu(scores + k, p);
    sum = _mm512_add_ps(sum, p);
  }
  return _mm512_reduce_add_ps(sum);
}

// sums[g][d … d + 16·n) += Σ_k p[g][k]·values[k][d …] over keys [begin, end), for `group` ≤ 4 rows g.
template <int group, int n, typename T>
void add_values(const float* p, int64_t ldp, const T* values, int64_t head_dim, int64_t begin, int64_t end,
                float* sums) {
  __m512 partial[group][n] = {};
  for (int64_t k = begin; k < end; ++k) {
    __m512 v[n];
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) v[j] = loadu(values + k * head_dim + 16 * j);
#pragma GCC unroll 4
    for (int g = 0; g < group; ++g) {
      const __m512 weight = _mm512_set1_ps(p[g * ldp + k]);
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) partial[g][j] = _mm512_fmadd_ps(weight, v[j], partial[g][j]);
    }
  }
  for (int g = 0; g < group; ++g) {
    for (int j = 0; j < n; ++j) {
      float* to = sums + g * head_dim + 16 * j;
      storeu(to, _mm512_add_ps(loadu(to), partial[g][j]));
    }
  }
}

template <int group, typename T>
void add_value_columns(const float* p, int64_t ldp, const T* values, int64_t head_dim, int64_t begin, int64_t end,
                       float* sums) {
  int64_t d = 0;
  for (; d + 64 <= head_dim; d += 64) add_values<group, 4>(p, ldp, values + d, head_dim, begin, end, sums + d);
  for (; d < head_dim; d += 16) add_values<group, 1>(p, ldp, values + d, head_dim, begin, end, sums + d);
}

template <typename T>
struct DecodeAttention {
  HeadView<const T> q, k, v;
  CacheView<T> keys, values;
  const int64_t *slots, *positions;
  int64_t tokens, heads, longest;  // longest: of the positions, plus one
  float scale;
  T* out;  // [tokens, heads, head_dim]

  const int64_t kv_heads = keys.heads, head_dim = keys.head_dim, group = heads / keys.heads;
  const int64_t ld_scores = round_up(longest, 16);

  struct Scratch {
    float *scores, *sums;
  };

  void run() const {
    parallel_for_dynamic(
        tokens * kv_heads,
        [&](ScratchArena& arena) {
          return Scratch{arena.take<float>(group * ld_scores), arena.take<float>(group * head_dim)};
        },
        [&](int64_t unit, Scratch& s) { attend(unit / kv_heads, unit % kv_heads, s); });
  }

  void attend(int64_t token, int64_t kv_head, const Scratch& s) const {
    static constexpr decltype(&add_value_columns<1, T>) kAddValues[4] = {
        add_value_columns<1, T>, add_value_columns<2, T>, add_value_columns<3, T>, add_value_columns<4, T>};
    const int64_t position = positions[token], count = position + 1;
    T *slot_keys = keys.at(slots[token], kv_head), *slot_values = values.at(slots[token], kv_head);
    std::copy_n(k.at(kv_head, token), head_dim, slot_keys + position * head_dim);
    std::copy_n(v.at(kv_head, token), head_dim, slot_values + position * head_dim);
    for (int64_t key = 0; key < count; key += 16) {
      for (int64_t g = 0; g < group; ++g) {
        dot_16_keys(q.at(kv_head * group + g, token), slot_keys + key * head_dim, head_dim, count - key,
                    s.scores + g * ld_scores + key);
      }
    }
    T* const rows = out + (token * heads + kv_head * group) * head_dim;
    std::fill_n(s.sums, group * head_dim, 0.0f);
    float inverse[4];
    for (int64_t g = 0; g < group; g += 4) {
      const int64_t some = std::min<int64_t>(4, group - g);
      float* const p = s.scores + g * ld_scores;
      for (int64_t i = 0; i < some; ++i) inverse[i] = 1.0f / softmax_terms(p + i * ld_scores, count, scale * kLog2E);
      for (int64_t key = 0; key < count; key += kKeyBlock) {
        kAddValues[some - 1](p, ld_scores, slot_values, head_dim, key, std::min(count, key + kKeyBlock),
                             s.sums + g * head_dim);
      }
      for (int64_t i = 0; i < some; ++i) {
        for (int64_t d = 0; d < head_dim; d += 16) {
          const __m512 sum = loadu(s.sums + (g + i) * head_dim + d);
          storeu(rows + (g + i) * head_dim + d, _mm512_mul_ps(sum, _mm512_set1_ps(inverse[i])));
        }
      }
    }
  }
};

#endif

bool ready(ScalarType type) {
#ifdef __AVX512BF16__
  if (type == ScalarType::BFloat16) return true;
#endif
#ifdef __AVX512F__
  return type == ScalarType::Float;
#else
  return false;
#endif
}

bool decode_attention_ready(ScalarType type) { return ready(type); }

void check_distinct(const int64_t* slots, int64_t tokens, int64_t count) {
  std::vector<bool> seen(count);
  for (int64_t i = 0; i < tokens; ++i) {
    STD_TORCH_CHECK(!seen[slots[i]], "decode attention: slot ", slots[i], " has more than one token");
    seen[slots[i]] = true;
  }
}

// keys and values ← k and v at (slot, position) of each token; out [tokens, Hq, D] ← attention of q to positions up to
// the token's own. q [1, Hq, T, D], k and v [1, Hkv, T, D] with contiguous rows; keys, values [slots, Hkv, capacity, D]
// and out contiguous; slots, all different, and positions int64 [T]; all others fp32 or bf16; D a multiple of 16.
void decode_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor slots, const Tensor positions,
                      double scale, Tensor keys, Tensor values, Tensor out) {
  const ScalarType type = q.scalar_type();
  STD_TORCH_CHECK(ready(type), "decode attention: no kernel for this dtype on this CPU");
  STD_TORCH_CHECK(q.dim() == 4 && keys.dim() == 4 && keys.size(1) > 0 && q.size(1) % keys.size(1) == 0,
                  "decode attention: the heads of keys must divide those of queries");
  const int64_t heads = q.size(1), tokens = q.size(2), head_dim = q.size(3), kv_heads = keys.size(1);
  STD_TORCH_CHECK(head_dim > 0 && head_dim % 16 == 0 && scale > 0,
                  "decode attention: head_dim must be a multiple of 16, and scale positive");
  check_heads(q, type, heads, tokens, head_dim, "q");
  check_heads(k, type, kv_heads, tokens, head_dim, "k");
  check_heads(v, type, kv_heads, tokens, head_dim, "v");
  for (const Tensor& cache : {keys, values}) {
    STD_TORCH_CHECK(
        cache.dim() == 4 && cache.scalar_type() == type && cache.is_contiguous() && cache.size(0) == keys.size(0) &&
            cache.size(1) == kv_heads && cache.size(2) == keys.size(2) && cache.size(3) == head_dim,
        "decode attention: keys and values must be contiguous [slots, ", kv_heads, ", capacity, ", head_dim, "]");
  }
  STD_TORCH_CHECK(out.scalar_type() == type && out.is_contiguous() && out.numel() == heads * tokens * head_dim,
                  "decode attention: out must be contiguous [tokens, ", heads, ", ", head_dim, "]");
  check_index(slots, tokens, 0, keys.size(0), "slots");
  check_index(positions, tokens, 0, keys.size(2), "positions");
  check_distinct(data_ptr<int64_t>(slots), tokens, keys.size(0));
  if (tokens == 0) return;
#ifdef __AVX512F__
  const int64_t* at = data_ptr<int64_t>(positions);
  const auto run = [&]<typename T>(T) {
    const auto cache = [&](const Tensor& t) { return CacheView<T>{data_ptr<T>(t), kv_heads, t.size(2), head_dim}; };
    DecodeAttention<T>{head_view<const T>(q),
                       head_view<const T>(k),
                       head_view<const T>(v),
                       cache(keys),
                       cache(values),
                       data_ptr<int64_t>(slots),
                       at,
                       tokens,
                       heads,
                       *std::max_element(at, at + tokens) + 1,
                       static_cast<float>(scale),
                       data_ptr<T>(out)}
        .run();
  };
  if (type == ScalarType::Float) return run(float{});
#ifdef __AVX512BF16__
  run(bf16_t{});
#endif
#endif
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("decode_attention_ready(ScalarType dtype) -> bool");
  m.def(
      "decode_attention(Tensor q, Tensor k, Tensor v, Tensor slots, Tensor positions, float scale, Tensor(a!) keys, "
      "Tensor(b!) values, Tensor(c!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("decode_attention_ready", TORCH_BOX(&pact_fast::decode_attention_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) { m.impl("decode_attention", TORCH_BOX(&pact_fast::decode_attention)); }
