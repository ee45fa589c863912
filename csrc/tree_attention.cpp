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

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>

#include "brgemm.h"
#include "transpose.h"
#endif

#include "work.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// A matrix [rows, width] for each head.
template <typename T>
struct Heads {
  T* data;
  int64_t head, row;  // strides

  T* at(int64_t h, int64_t i) const { return data + h * head + i * row; }
};

// q [heads, rows, width], k and v [groups, keys, width]. Row i stands where key `after + i` does.
struct Sizes {
  int64_t heads, groups, rows, keys, width;
  float scale;

  int64_t after() const { return keys - rows; }
};

template <typename T>
struct Inputs {
  Heads<const T> q, k, v;
  const int64_t* end;  // [keys], in the numbering of keys
  Sizes size;
};

template <typename T>
struct Grads {
  Heads<const T> out, d_out;
  const float* lse;  // [2, heads, rows], see Forward
  float* work;       // [heads, rows up to whole tiles, width + 3]
  Heads<T> dq, dk, dv;
};

#ifdef __AVX512F__

using pact_fast::brgemm;
using pact_fast::ceil_div;
using pact_fast::round_up;

constexpr int64_t kTile = 64;             // keys and rows of a tile of scores
constexpr int64_t kScores = kTile * kTile;
constexpr int64_t kOwned = 256 * kTile;  // numbers in an operand of the tiles that a unit owns: they stay in the cache
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kNoScore = -1e30f;  // less than any, and finite when scaled

template <typename T>
constexpr int64_t kPair = 4 / sizeof(T);  // numbers in 32 bits

// How many tiles a unit of work owns.
int64_t owned(int64_t width) { return std::clamp<int64_t>(kOwned / (kTile * width), 1, 4); }

__mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }

inline void store(float* p, __m512 x) { _mm512_storeu_ps(p, x); }

// 16 numbers of row k and of row k + 1 of an operand A, whose rows have kTile numbers.
inline void store_rows(float* a, __m512 x, __m512 y) {
  store(a, x);
  store(a + kTile, y);
}

// The same of an operand B.
inline void store_pairs(float* b, int64_t k, int64_t column, __m512 x, __m512 y) { store_rows(b + k * kTile + column, x, y); }

// B from `count` ≤ kTile rows; zeros up to kTile rows.
inline void pair(const float* rows, int64_t ld, int64_t count, int64_t width, float* b) {
  for (int64_t k = 0; k < kTile; ++k) {
    for (int64_t d = 0; d < width; d += 16) store(b + k * width + d, k < count ? load(rows + k * ld + d) : _mm512_setzero_ps());
  }
}

#ifdef __AVX512BF16__
using pact_fast::Bits;

inline __m256i half(const Bits* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m512 load(const Bits* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half(p)), 16)); }

inline void store(Bits* p, __m512 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
}

inline void store_rows(Bits* a, __m512 x, __m512 y) {
  store(a, x);
  store(a + kTile, y);
}

// y's numbers behind x's → x's and y's in turn.
inline __m512i interleaved(__m512i both) {
  alignas(64) static constexpr auto kTurns = [] {
    std::array<int16_t, 32> at{};
    for (int i = 0; i < 32; ++i) at[i] = static_cast<int16_t>(i / 2 + i % 2 * 16);
    return at;
  }();
  return _mm512_permutexvar_epi16(_mm512_load_si512(kTurns.data()), both);
}

inline void store_pairs(Bits* b, int64_t k, int64_t column, __m512 x, __m512 y) {
  const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x));
  _mm512_storeu_si512(b + k * kTile + 2 * column, interleaved(both));
}

inline void pair(const Bits* rows, int64_t ld, int64_t count, int64_t width, Bits* b) {
  for (int64_t k = 0; k < kTile; k += 2) {
    for (int64_t d = 0; d < width; d += 16) {
      const Bits* p = rows + k * ld + d;
      const __m256i zero = _mm256_setzero_si256(), x = k < count ? half(p) : zero, y = k + 1 < count ? half(p + ld) : zero;
      _mm512_storeu_si512(b + k * width + 2 * d, interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1)));
    }
  }
}
#endif

// out[u][r] ← the 32 bits at place u of row r; `rows` rows (a multiple of 16), zeros from row `count` on.
template <typename T>
void turn(const T* in, int64_t ld, int64_t count, int64_t rows, int64_t width, T* out, int64_t out_ld) {
  const int64_t units = width / kPair<T>;
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t u = 0; u < units; u += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi32(r + i < count ? lanes(units - u) : 0, in + (r + i) * ld + u * kPair<T>);
      }
      pact_fast::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (u + i < units) _mm512_storeu_si512(out + (u + i) * out_ld + r * kPair<T>, block[i]);
      }
    }
  }
}

// Rows of a head as B of a product whose depth is the width of the head: [width, kTile].
template <typename T>
void pack_turned(const T* rows, int64_t ld, int64_t count, int64_t width, T* b) {
  turn(rows, ld, count, kTile, width, b, kTile * kPair<T>);
}

// `paired`, rows of a head as B, as A of a product whose depth are the rows: [width, ld].
template <typename T>
void turn_paired(const T* paired, int64_t width, T* a, int64_t ld) {
  turn(paired, width * kPair<T>, kTile, kTile / kPair<T>, width * kPair<T>, a, ld);
}

// Rows of a head as A of a product whose depth is the width of the head.
template <typename T>
void pack_rows(const T* rows, int64_t ld, int64_t count, int64_t width, T* a) {
  for (int64_t k = 0; k < kTile; ++k) {
    if (k < count) {
      std::copy_n(rows + k * ld, width, a + k * width);
    } else {
      std::fill_n(a + k * width, width, T{});
    }
  }
}

// Rows of a head [count, width] ← factor[r]·turned[d][r].
template <typename T>
void unturn(const float* turned, const float* factor, int64_t count, int64_t width, T* rows, int64_t ld) {
  for (int64_t r = 0; r < count; r += 16) {
    const __m512 factors = load(factor + r);
    for (int64_t d = 0; d < width; d += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_castps_si512(_mm512_mul_ps(factors, load(turned + (d + i) * kTile + r)));
      }
      pact_fast::transpose(block);
      for (int i = 0; i < std::min<int64_t>(16, count - r); ++i) store(rows + (r + i) * ld + d, _mm512_castsi512_ps(block[i]));
    }
  }
}

// 2ˣ for x ≤ 127, exactly 1 at 0, 0 for x < −200; NaN stays. Within 2 ulp where T is fp32; within 3e−6, a thousandth of what
// it will be rounded by, where it is bf16.
template <typename T>
inline __m512 exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  const auto power = [&](auto first, auto... coefficients) {  // minimax on ±1/2
    __m512 y = _mm512_set1_ps(first);
    ((y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(coefficients))), ...);
    return y;
  };
  if constexpr (sizeof(T) == 2) {
    return _mm512_scalef_ps(power(9.582852993e-3f, 5.590642474e-2f, 2.402409861e-1f, 6.931241934e-1f, 1.0f), n);
  }
  return _mm512_scalef_ps(power(1.535336188e-4f, 1.339887440e-3f, 9.618437357e-3f, 5.550332471e-2f, 2.402264791e-1f,
                                6.931472028e-1f, 1.0f), n);
}

// Asks for rows of a head, while there is something else to do: they lie apart, which processors do not foresee.
template <typename T>
inline void fetch(const T* rows, int64_t ld, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; d < width; d += 64 / sizeof(T)) {
      _mm_prefetch(reinterpret_cast<const char*>(rows + i * ld + d), _MM_HINT_T1);
    }
  }
}

// Who sees whom, tile by tile.
class Mask {
 public:
  Mask(const int64_t* end, const Sizes& size) : size_(size), tiles_(ceil_div(size.keys, kTile)), end_(tiles_ * kTile, 0) {
    std::copy_n(end, size.keys, end_.begin());  // nobody sees what is beyond the last key
    for (int64_t t = 0; t < tiles_; ++t) {
      const auto [low, high] = std::minmax_element(end_.begin() + t * kTile, end_.begin() + (t + 1) * kTile);
      low_.push_back(*low);
      high_.push_back(*high);
    }
  }

  int64_t key_tiles() const { return tiles_; }
  int64_t row_tiles() const { return ceil_div(size_.rows, kTile); }

  // Whether any row of a tile may see any key of one.
  bool some(int64_t keys, int64_t rows) const { return keys * kTile < first(rows + 1) && first(rows) < high_[keys]; }

  // Whether all of a whole tile see all of one.
  bool all(int64_t keys, int64_t rows) const { return (keys + 1) * kTile <= first(rows) + 1 && first(rows + 1) <= low_[keys]; }

  // [kTile] for each key the rows that see it.
  void write(int64_t keys, int64_t rows, uint64_t* seen) const {
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t key = keys * kTile + i;
      seen[i] = below(end_[key] - first(rows)) & ~below(key - first(rows));
    }
  }

 private:
  // Where the first row of a tile stands among the keys.
  int64_t first(int64_t rows) const { return size_.after() + rows * kTile; }

  static uint64_t below(int64_t count) { return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1; }

  Sizes size_;
  int64_t tiles_;
  std::vector<int64_t> end_, low_, high_;
};

// Pieces of one thread's memory.
class Pieces {
 public:
  explicit Pieces(char* at) : at_(at) {}

  template <typename U>
  U* take(int64_t count) {
    char* piece = at_;
    at_ += round_up(count * sizeof(U), 64);
    return reinterpret_cast<U*>(piece);
  }

 private:
  char* at_;
};

// ---- forward

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
void shrink(float* out, const float* decay, int64_t width) {
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
    pact_fast::share<char, pact_fast::Tiles>(blocks * size.heads, scratch, [&](int64_t u, char* mine) {
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

// ---- backward

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
    using pact_fast::share;
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

template <typename T>
void forward(const Inputs<T>& in, const Heads<T>& out, float* lse) {
  Forward<T>{in, out, lse}.run();
}

template <typename T>
void backward(const Inputs<T>& in, const Grads<T>& grads) {
  Backward<T>{in, grads}.run();
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
