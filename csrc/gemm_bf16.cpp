// The three products of the fused head for bf16 values, with fp32 results, on CPUs with bf16 instructions.
//
//     z[n, V] = x·Wᵀ        dx[n, D] = bf16(dz)·W        dW[V, D] += bf16(dz)ᵀ·x        (dW: 24 bits, see `split`)
//
// PyTorch has no such matrix product on CPU: its bf16 one rounds the result, and an fp32 one leaves the bf16 units idle.
// Inside it is oneDNN's block product C (+)= A·B (`brgemm`: AMX or AVX512-BF16, fp32 sums), which we call here. It wants
// A by rows and B as pairs of rows, B[K/2][N][2]; this file makes those, and decides who works on what:
//
//  * B comes in panels of 64 columns: four registers of sums, what the block product is built for. A panel of at most
//    2048 rows takes 256 KiB, so that it stays in the second-level cache (1 MiB) while all of A streams past it.
//  * dz is worked on in slabs of 768 columns, rounded once and written twice: by rows, as A of dx, and by columns, as A
//    of dW. While one slab is worked on, the next one is rounded. With up to 1024 rows at a time that is 4 × 1.5 MiB for all
//    threads together; the packed x has its own size.
//  * One unit of work owns an element of a result, and sums go in the order of K, whatever thread takes the unit.
//
// `brgemm` is exported by libtorch_cpu but not part of its stable ABI, hence the weak symbol and `ready`: where it is not
// there, or does not do what we expect of it, callers have to take another way.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <optional>

#ifdef __AVX512BF16__  // every CPU with AMX has it, too
#include <immintrin.h>

#include "transpose.h"

namespace at::native::cpublas {
[[gnu::weak]] void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool pairs);
[[gnu::weak]] void brgemm_release(bool pairs);
}  // namespace at::native::cpublas
#endif

#include "work.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kRows = 1024;  // rows of dz worked on at a time

using Bits = uint16_t;  // a bf16 number

// A matrix of sums that grows from call to call; see `split`.
struct Sums {
  Bits* high;
  int8_t* rest;
  int64_t ld;
  bool add;  // to what is there, or not
};

#ifdef __AVX512BF16__

namespace blas = at::native::cpublas;
using pact_fast::buffer;
using pact_fast::ceil_div;
using pact_fast::round_up;
using Buffer = pact_fast::Buffer<Bits>;

constexpr int64_t kPanel = 64;    // columns of B
constexpr int64_t kDepth = 2048;  // rows of a panel in z = x·Wᵀ
constexpr int64_t kSlab = 768;    // columns of dz worked on at a time
constexpr int64_t kWide = 1024;   // columns of dW worked on at a time
constexpr int64_t kTall = 32;     // rows of dW worked on at a time
constexpr int64_t kScratch = std::max(kSlab * kPanel, 2 * kTall * kWide);  // a panel of W, or sums of dW

// AMX tiles stay configured after a product. A thread of torch's pool has to be left without: the configuration is part of
// its state, slows down every switch between threads, and is not the one that other users of the tiles expect.
struct Tiles {
  ~Tiles() { blas::brgemm_release(true); }
};

// What this thread is likely to pack next: asked for while the block product is at work, else packing waits for memory.
struct Ahead {
  const Bits* from = nullptr;
  int64_t ld = 0, rows = 0, columns = 0;

  void fetch(int64_t part, int64_t parts) const {
    for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r) {
      for (int64_t k = 0; k < columns; k += 32) _mm_prefetch(reinterpret_cast<const char*>(from + r * ld + k), _MM_HINT_T1);
    }
  }
};

// C[m, n] (+)= A[m, k]·B, B one panel; k even. `brgemm` compiles code for every shape it meets and keeps it, per
// thread: pieces of 64 rows, at most one of 16, 32 or 48 and one below bound the number of shapes.
void product(int64_t m, int64_t n, int64_t k, const Bits* a, int64_t lda, const Bits* b, float* c, int64_t ldc, bool add,
             const Ahead& ahead = {}) {
  const int64_t parts = ceil_div(m, 64);
  for (int64_t i = 0; i < m;) {
    if (i % 64 == 0) ahead.fetch(i / 64, parts);
    const int64_t left = m - i, rows = left >= 64 ? 64 : left >= 16 ? left & ~15 : left;
    blas::brgemm(rows, n, k, lda, kPanel, ldc, add, reinterpret_cast<const c10::BFloat16*>(a + i * lda),
                 reinterpret_cast<const c10::BFloat16*>(b), c + i * ldc, true);
    i += rows;
  }
}

// The first `count` of up to 32 lanes.
uint32_t lanes(int64_t count) { return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1; }

// A panel whose columns are rows of w: w is [rows, depth], rows ≤ 64; the panel gets zeros up to 64 columns and an even
// depth. Room for a multiple of 32 in depth.
void pack_transposed(const Bits* w, int64_t ld, int64_t rows, int64_t depth, Bits* panel) {
  for (int64_t n = 0; n < kPanel; n += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi16(n + i < rows ? lanes(depth - k) : 0, w + (n + i) * ld + k);
      }
      pact_fast::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (k + 2 * i) * kPanel + 2 * n, block[i]);
    }
  }
}

__m512i pairs(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// A panel of `columns` ≤ 64 columns of b [rows, ·]; zeros up to 64 columns and up to `depth` (even) rows.
void pack(const Bits* b, int64_t ld, int64_t rows, int64_t columns, int64_t depth, Bits* panel) {
  for (int64_t k = 0; k < depth; k += 2) {
    for (int64_t n = 0; n < kPanel; n += 16) {
      const auto mask = static_cast<__mmask16>(lanes(columns - n));
      const Bits* source = b + k * ld + n;
      const __m256i first = _mm256_maskz_loadu_epi16(k < rows ? mask : 0, source);
      const __m256i second = _mm256_maskz_loadu_epi16(k + 1 < rows ? mask : 0, source + ld);
      _mm512_store_si512(panel + k * kPanel + 2 * n, pairs(first, second));
    }
  }
}

// 32×16 numbers of dz [rows, columns], rounded: into a [·, kSlab] and, transposed, into at [·, depth]. What lies outside
// of dz is zero. Either target may be null.
void round_tile(const float* dz, int64_t ld, int64_t rows, int64_t columns, Bits* a, Bits* at, int64_t depth) {
  const auto mask = static_cast<__mmask16>(lanes(columns));
  __m512i block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    __m256i half[2];
    for (int j = 0; j < 2; ++j) {
      const int64_t row = 2 * i + j;
      const __m512 values = _mm512_maskz_loadu_ps(row < rows ? mask : 0, dz + row * ld);
      half[j] = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
      if (a != nullptr) _mm256_store_si256(reinterpret_cast<__m256i*>(a + row * kSlab), half[j]);
    }
    block[i] = pairs(half[0], half[1]);
  }
  if (at == nullptr) return;
  pact_fast::transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(at + i * depth, block[i]);
}

// Sums that outlive a call are kept in 24 bits: the nearest bf16 number, `high`, and what it lacks in 1/256 of its last
// place. Together they are off by 2⁻¹⁶ at most, which is little beside the 2⁻⁸ of a bf16 result, take 3 bytes instead of 4, and
// `high` by itself is the rounded sum: no second matrix and no pass that casts it. Floats of one sign are ordered like
// their bits, so rounding is integer arithmetic, across powers of 2, too. NaNs here come from bf16 numbers or from the
// processor: their last 16 bits are 0, and rounding carries nothing over.
struct Split {
  __m512i bits, nearest;  // of 16 floats: rounded to 24 bits in the upper 24, to 16 bits in the upper 16
};

Split split(__m512 sums) {
  const __m512i bits = _mm512_add_epi32(_mm512_castps_si512(sums), _mm512_set1_epi32(0x80));
  return {bits, _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000))};
}

__m512 join(__m256i high, __m128i rest) {
  const __m512i nearest = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
  return _mm512_castsi512_ps(_mm512_add_epi32(nearest, _mm512_slli_epi32(_mm512_cvtepi8_epi32(rest), 8)));
}

// high, rest [n] (+)= sums, n ≤ 16.
void grow(const float* sums, int64_t n, Bits* high, int8_t* rest, bool add) {
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
void grow_row(const float* sums, int64_t n, Bits* high, int8_t* rest, bool add) {
  int64_t j = 0;
  for (; j + kPanel <= n; j += kPanel) (add ? grow_panel<true> : grow_panel<false>)(sums + j, high + j, rest + j);
  for (; j < n; j += 16) grow(sums + j, n - j, high + j, rest + j, add);
}

// Whether the block product is there and means by its arguments what we mean.
bool ready() {
  if (blas::brgemm == nullptr || blas::brgemm_release == nullptr) return false;
  alignas(64) Bits a[2 * 4], b[4 * kPanel];
  float c[2 * 5];
  const auto bits = [](int value) { return c10::BFloat16(static_cast<float>(value)).x; };
  for (int i = 0; i < 8; ++i) a[i] = bits(i + 1);
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < kPanel; ++j) b[(k & ~1) * kPanel + 2 * j + (k & 1)] = bits((k + 1) * (j - 2));
  }
  std::fill(c, c + 10, 1.0f);
  try {
    const Tiles tiles;
    product(2, 5, 4, a, 4, b, c, 5, true);
  } catch (const std::exception&) {  // without oneDNN: switched off by the user, or not built in
    return false;
  }
  for (int i = 0; i < 10; ++i) {
    const int row_sum = i < 5 ? 1 + 4 + 9 + 16 : 5 + 12 + 21 + 32;
    if (c[i] != static_cast<float>(1 + row_sum * (i % 5 - 2))) return false;
  }
  return true;
}

// As share(), on a thread that is left without tiles.
template <typename Work>
void share(int64_t units, int64_t scratch, const Work& work) {
  pact_fast::share<Bits, Tiles>(units, scratch, work);
}

void logits(const Bits* x, const Bits* weight, float* z, int64_t rows, int64_t vocab, int64_t width, int64_t z_stride) {
  const int64_t ld = round_up(width, 2);
  Buffer even;  // x with an even number of columns
  if (ld != width) {
    even = buffer<Bits>(rows * ld);
    for (int64_t i = 0; i < rows; ++i) {
      std::copy_n(x + i * width, width, &even[i * ld]);
      even[i * ld + width] = 0;
    }
    x = even.get();
  }
  const int64_t threads = torch::stable::get_num_threads();
  share(ceil_div(vocab, kPanel), std::min(round_up(width, 32), kDepth) * kPanel, [&](int64_t unit, Bits* panel) {
    const int64_t v = unit * kPanel, columns = std::min(kPanel, vocab - v), next = v + threads * kPanel;
    for (int64_t k = 0; k < width; k += kDepth) {
      const int64_t depth = std::min(kDepth, width - k);
      const Ahead ahead = next < vocab ? Ahead{weight + next * width + k, width, std::min(kPanel, vocab - next), depth} : Ahead{};
      pack_transposed(weight + v * width + k, width, columns, depth, panel);
      product(rows, columns, round_up(depth, 2), x + k, ld, panel, z + v, z_stride, k > 0, ahead);
    }
  });
}

// dx and d_weight from up to kRows rows of dz. dx may be null, d_weight.high as well.
struct Grads {
  const float* dz;
  int64_t dz_stride;
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

  // 32 rows of the slab at v.
  void round_stripe(int64_t v, int64_t stripe) {
    const int64_t i = 32 * stripe, slab = std::min(kSlab, vocab - v), which = v / kSlab % 2;
    for (int64_t j = 0; j < slab; j += 16) {
      round_tile(dz + i * dz_stride + v + j, dz_stride, rows - i, slab - j, dx == nullptr ? nullptr : &a[which][i * kSlab + j],
                 d_weight.high == nullptr ? nullptr : &at[which][j * depth + i], depth);
    }
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

void grads(const float* dz, int64_t dz_stride, const Bits* x, const Bits* weight, float* dx, const Sums& d_weight,
           int64_t rows, int64_t vocab, int64_t width) {
  Grads{dz, dz_stride, x, weight, dx, d_weight, rows, vocab, width}.run();
}

#else  // callers ask bf16_products_ready first

bool ready() { return false; }
void logits(const Bits*, const Bits*, float*, int64_t, int64_t, int64_t, int64_t) {}
void grads(const float*, int64_t, const Bits*, const Bits*, float*, const Sums&, int64_t, int64_t, int64_t) {}

#endif

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

bool is(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && columns > 0;
}

// Rows may be further apart than they are long.
bool is_rows(const Tensor& t, int64_t rows, int64_t columns) {
  return is(t, ScalarType::Float, rows, columns) && t.stride(1) == 1;
}

bool is_whole(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return is(t, type, rows, columns) && t.is_contiguous();
}

}  // namespace

bool bf16_products_ready() { return ready(); }

// z ← x·Wᵀ: x [n, D], weight [V, D] bf16, contiguous; z [n, V] fp32, rows contiguous.
void bf16_logits(const Tensor x, const Tensor weight, Tensor z) {
  const int64_t rows = x.size(0), vocab = weight.size(0), width = x.size(1);
  STD_TORCH_CHECK(ready(), "no bf16 products here");
  STD_TORCH_CHECK(is_whole(x, ScalarType::BFloat16, rows, width) && is_whole(weight, ScalarType::BFloat16, vocab, width),
                  "x and weight: contiguous bf16 matrices of one width");
  STD_TORCH_CHECK(is_rows(z, rows, vocab), "z: fp32, a row for each of x, a column for each row of weight");
  logits(data<Bits>(x), data<Bits>(weight), data<float>(z), rows, vocab, width, z.stride(0));
}

// dx ← dz·W and d_weight ← or, if `add`, += dzᵀ·x, dz [n, V] fp32 (rows contiguous) rounded to bf16; dx [n, D] fp32.
// d_weight [V, D] bf16 is the rounded sum, rest [V, D] int8 what it lacks (see `split`); both are given or neither.
void bf16_grads(const Tensor dz, const Tensor x, const Tensor weight, std::optional<Tensor> dx,
                std::optional<Tensor> d_weight, std::optional<Tensor> rest, bool add) {
  const int64_t rows = x.size(0), vocab = weight.size(0), width = x.size(1);
  STD_TORCH_CHECK(ready(), "no bf16 products here");
  STD_TORCH_CHECK(is_whole(x, ScalarType::BFloat16, rows, width) && is_whole(weight, ScalarType::BFloat16, vocab, width),
                  "x and weight: contiguous bf16 matrices of one width");
  STD_TORCH_CHECK(is_rows(dz, rows, vocab), "dz: fp32, a row for each of x, a column for each row of weight");
  STD_TORCH_CHECK(!dx || is_whole(*dx, ScalarType::Float, rows, width), "dx: contiguous, fp32, of the shape of x");
  STD_TORCH_CHECK(d_weight.has_value() == rest.has_value() &&
                      (!d_weight || (is_whole(*d_weight, ScalarType::BFloat16, vocab, width) &&
                                     is_whole(*rest, ScalarType::Char, vocab, width))),
                  "d_weight and rest: contiguous, bf16 and int8, of the shape of weight");
  for (int64_t i = 0; i < rows; i += kRows) {
    const Sums sums{d_weight ? data<Bits>(*d_weight) : nullptr, rest ? data<int8_t>(*rest) : nullptr, width, add || i > 0};
    grads(data<float>(dz) + i * dz.stride(0), dz.stride(0), data<Bits>(x) + i * width, data<Bits>(weight),
          dx ? data<float>(*dx) + i * width : nullptr, sums, std::min(kRows, rows - i), vocab, width);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("bf16_products_ready() -> bool");
  m.def("bf16_logits(Tensor x, Tensor weight, Tensor(a!) z) -> ()");
  m.def(
      "bf16_grads(Tensor dz, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? d_weight, "
      "Tensor(c!)? rest, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("bf16_products_ready", TORCH_BOX(&bf16_products_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("bf16_logits", TORCH_BOX(&bf16_logits));
  m.impl("bf16_grads", TORCH_BOX(&bf16_grads));
}
