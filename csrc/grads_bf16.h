// The two products of the head's backward pass from a chunk of dz [n, V], rounded to bf16 on the way:
//
//     dx[n, D] = bf16(dz)·W        dW[V, D] += bf16(dz)ᵀ·x        (dW: 24 bits, see `split`)
//
//  * dz is worked on in slabs of 768 columns, rounded once and written twice: by rows, as A of dx, and by columns, as A
//    of dW. While one slab is worked on, the next one is rounded. With up to 1024 rows at a time that is 4 × 1.5 MiB for all
//    threads together; the packed x has its own size.
//  * One unit of work owns an element of a result, and sums go in the order of K, whatever thread takes the unit.

#pragma once

#include <optional>

#include "panels_bf16.h"

namespace pact_fast::bf16 {

constexpr int64_t kRows = 1024;  // rows of dz worked on at a time

// A matrix of sums that grows from call to call; see `split`.
struct Sums {
  Bits* high;
  int8_t* rest;
  int64_t ld;
  bool add;  // to what is there, or not
};

// dx [n, D] fp32, d_weight [V, D] bf16 and rest [V, D] int8 are what the products may be written to.
inline void check_grads(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& dx,
                        const std::optional<Tensor>& d_weight, const std::optional<Tensor>& rest) {
  STD_TORCH_CHECK(!dx || is_whole(*dx, ScalarType::Float, x.size(0), x.size(1)),
                  "dx: contiguous, fp32, of the shape of x");
  STD_TORCH_CHECK(d_weight.has_value() == rest.has_value() &&
                      (!d_weight || (is_whole(*d_weight, ScalarType::BFloat16, weight.size(0), weight.size(1)) &&
                                     is_whole(*rest, ScalarType::Char, weight.size(0), weight.size(1)))),
                  "d_weight and rest: contiguous, bf16 and int8, of the shape of weight");
}

#ifdef __AVX512BF16__

constexpr int64_t kSlab = 768;    // columns of dz worked on at a time
constexpr int64_t kWide = 1024;   // columns of dW worked on at a time
constexpr int64_t kTall = 48;     // rows of dW worked on at a time: 6 at a time are the block product's loop
constexpr int64_t kScratch = std::max(kSlab * kPanel, 2 * kTall * kWide);  // a panel of W, or sums of dW

// Sums that outlive a call are kept in 24 bits: the nearest bf16 number, `high`, and what it lacks in 1/256 of its last
// place. Together they are off by 2⁻¹⁶ at most, which is little beside the 2⁻⁸ of a bf16 result, take 3 bytes instead of 4, and
// `high` by itself is the rounded sum: no second matrix and no pass that casts it. Floats of one sign are ordered like
// their bits, so rounding is integer arithmetic, across powers of 2, too. NaNs here come from bf16 numbers or from the
// processor: their last 16 bits are 0, and rounding carries nothing over.
struct Split {
  __m512i bits, nearest;  // of 16 floats: rounded to 24 bits in the upper 24, to 16 bits in the upper 16
};

inline Split split(__m512 sums) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(sums), _mm512_set1_epi32(0x80));
  return {bits, _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000))};
}

inline __m512 join(__m256i high, __m128i rest) {
  const __m512i nearest = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
  return _mm512_castsi512_ps(_mm512_add_epi32(nearest, _mm512_slli_epi32(_mm512_cvtepi8_epi32(rest), 8)));
}

// high, rest [n] (+)= sums, n ≤ 16.
inline void grow(const float* sums, int64_t n, Bits* high, int8_t* rest, bool add) {
  const auto mask = static_cast<__mmask16>(lanes(n));
  __m512 values = _mm512_maskz_loadu_ps(mask, sums);
  if (add) values = _mm512_add_ps(values, join(_mm256_maskz_loadu_epi16(mask, high), _mm_maskz_loadu_epi8(mask, rest)));
  const Split parts = split(values);
  _mm256_mask_storeu_epi16(high, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(parts.nearest, 16)));
  _mm_mask_storeu_epi8(rest, mask, _mm512_cvtepi32_epi8(_mm512_srli_epi32(parts.bits, 8)));
}

// The same for 64 numbers, without masks.
template <bool add>
void grow_panel(const float* sums, Bits* high, int8_t* rest) {
#pragma GCC unroll 4
  for (int i = 0; i < kPanel; i += 16) {
    __m512 values = _mm512_load_ps(sums + i);
    if (add) {
      const __m256i nearest = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + i));
      values = _mm512_add_ps(values, join(nearest, _mm_loadu_si128(reinterpret_cast<const __m128i*>(rest + i))));
    }
    const Split parts = split(values);
    const __m256i nearest = _mm512_cvtepi32_epi16(_mm512_srli_epi32(parts.nearest, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i), nearest);
    const __m128i less = _mm512_cvtepi32_epi8(_mm512_srli_epi32(parts.bits, 8));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rest + i), less);
  }
}

// One row of up to kWide sums.
inline void grow_row(const float* sums, int64_t n, Bits* high, int8_t* rest, bool add) {
  int64_t j = 0;
  for (; j + kPanel <= n; j += kPanel) (add ? grow_panel<true> : grow_panel<false>)(sums + j, high + j, rest + j);
  for (; j < n; j += 16) grow(sums + j, n - j, high + j, rest + j, add);
}

// 32×16 numbers, load(row) for each row, rounded: into a [·, kSlab] and, transposed, into at [·, depth]. Either may be
// null.
template <typename Load>
void round_tile(const Load& load, Bits* a, Bits* at, int64_t depth) {
  __m512i block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    __m256i half[2];
    for (int j = 0; j < 2; ++j) {
      const int64_t row = 2 * i + j;
      half[j] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(row)));
      if (a != nullptr) _mm256_store_si256(reinterpret_cast<__m256i*>(a + row * kSlab), half[j]);
    }
    block[i] = pairs(half[0], half[1]);
  }
  if (at == nullptr) return;
  pact_fast::transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(at + i * depth, block[i]);
}

// dx and d_weight from up to kRows rows of dz. dx may be null, d_weight.high as well. What dz is made from is up to Dz:
// dz.round(v, columns, i, a, at, depth) rounds the 32 rows from i on, zeros beyond the last one, of the slab at v, as
// round_tile does.
template <typename Dz>
struct Grads {
  const Dz& dz;
  const Bits *x, *weight;
  float* dx;
  Sums d_weight;
  int64_t rows, vocab, width;

  int64_t depth = round_up(rows, 32), panels = ceil_div(width, kPanel);
  int64_t parts = 1;  // of the rows of dx
  Buffer a[2], at[2], x_panels;  // a slab of dz by rows and by columns, the next one, and x

  void run() {
    // Where the panels of dx are too few for the threads, its rows are split, but no finer than 128, as every part packs
    // the panel of W again.
    const int64_t wanted = ceil_div(4 * torch::stable::get_num_threads(), panels);
    parts = std::clamp<int64_t>(wanted, 1, ceil_div(std::max(rows, int64_t{1}), 128));
    for (int i = 0; i < (vocab > kSlab ? 2 : 1); ++i) {
      if (dx != nullptr) a[i] = buffer<Bits>(depth * kSlab);
      if (d_weight.high != nullptr) at[i] = buffer<Bits>(kSlab * depth);
    }
    if (d_weight.high != nullptr) x_panels = buffer<Bits>(panels * kPanel * depth);
    const int64_t packed = d_weight.high == nullptr ? 0 : panels, stripes = depth / 32;
    share(packed + stripes, 0, [&](int64_t u, Bits*) { u < packed ? pack_x(u) : round_stripe(0, u - packed); });
    for (int64_t v = 0; v < vocab; v += kSlab) slab(v);
  }

  void pack_x(int64_t p) {
    pack(x + p * kPanel, width, rows, std::min(kPanel, width - p * kPanel), depth, &x_panels[p * kPanel * depth]);
  }

  // Both results from the slab at v, and meanwhile the rounding of the next one.
  void slab(int64_t v) {
    const int64_t of_dx = dx == nullptr ? 0 : panels * parts;
    const int64_t of_dw = d_weight.high == nullptr ? 0 : ceil_div(std::min(kSlab, vocab - v), kTall);
    const int64_t next = v + kSlab < vocab ? depth / 32 : 0;
    share(of_dx + of_dw + next, kScratch, [&](int64_t u, Bits* scratch) {
      if (u < of_dx) return input_grad(v, u, scratch);
      if (u < of_dx + of_dw) return weight_grad(v, kTall * (u - of_dx), reinterpret_cast<float*>(scratch));
      round_stripe(v + kSlab, u - of_dx - of_dw);
    });
  }

  void round_stripe(int64_t v, int64_t stripe) {
    const int64_t i = 32 * stripe, which = v / kSlab % 2;
    dz.round(v, std::min(kSlab, vocab - v), i, dx == nullptr ? nullptr : &a[which][i * kSlab],
             d_weight.high == nullptr ? nullptr : &at[which][i], depth);
  }

  // One panel of columns of dx, the rows of one part.
  void input_grad(int64_t v, int64_t unit, Bits* panel) {
    const int64_t size = round_up(ceil_div(rows, parts), 64), i = unit % parts * size, column = unit / parts * kPanel;
    if (i >= rows) return;
    const int64_t slab = std::min(kSlab, vocab - v), k = round_up(slab, 2), columns = std::min(kPanel, width - column);
    const Bits* here = weight + v * width;
    const int64_t next = (unit + torch::stable::get_num_threads()) / parts * kPanel;
    const Ahead ahead = next < width ? Ahead{here + next, width, slab, kPanel} : Ahead{};
    pack(here + column, width, slab, columns, k, panel);
    product(std::min(size, rows - i), columns, k, &a[v / kSlab % 2][i * kSlab], kSlab, panel, dx + i * width + column, width,
            v > 0, ahead);
  }

  // kTall rows of dW: first their products, in the cache, then the sums, which lie one after the other in memory.
  void weight_grad(int64_t v, int64_t i, float* c) {
    const int64_t m = std::min(kTall, std::min(kSlab, vocab - v) - i);
    for (int64_t first = 0; first < width; first += kWide) {
      const int64_t n = std::min(kWide, width - first);
      for (int64_t j = 0; j < n; j += kPanel) {
        product(m, std::min(kPanel, n - j), depth, &at[v / kSlab % 2][i * depth], depth, &x_panels[(first + j) * depth], c + j,
                kWide, false);
      }
      for (int64_t r = 0; r < m; ++r) {
        const int64_t place = (v + i + r) * d_weight.ld + first;
        grow_row(c + r * kWide, n, d_weight.high + place, d_weight.rest + place, d_weight.add);
      }
    }
  }
};

#endif

}  // namespace pact_fast::bf16
