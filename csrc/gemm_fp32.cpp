// The three products of the fused head in fp32, on CPUs with AVX-512.
//
//     z[n, V] = x·Wᵀ        dx[n, D] = dz·W        dW[V, D] += dzᵀ·x
//
// A BLAS packs both operands anew for every product, and MKL's leaves part of AMD's cores idle on these shapes (times:
// docs/kernels.md). Here few rows meet a large matrix, and of the two only the large one has to be packed:
//
//  * B comes in panels of 64 columns, four registers wide, of a depth that lets a panel stay in the second-level cache
//    (256 KiB of 1 MiB) while all of A streams past it. A tile of results is 6 rows of it: 24 registers of sums.
//  * dz is worked on in slabs of 768 columns, which stay in the third-level cache for both of the products that read it.
//  * One unit of work owns an element of a result, and sums go in the order of K, whatever thread takes the unit.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>

#include "transpose.h"
#endif

#include "work.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kDepth = 1024;  // rows of a panel; rows of dz worked on at a time

#ifdef __AVX512F__

using pact_fast::Buffer;
using pact_fast::buffer;
using pact_fast::ceil_div;
using pact_fast::round_up;
using pact_fast::share;

constexpr int64_t kPanel = 64;  // columns of B
constexpr int64_t kTile = 6;    // rows of A whose sums the registers hold
constexpr int64_t kPart = 64;   // terms of one running sum
constexpr int64_t kSlab = 768;  // columns of dz worked on at a time
constexpr int64_t kTall = 48;   // rows of dW worked on at a time

// The first `count` of up to 16 lanes.
__mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1); }

// A by rows, or by columns: entry (i, k) lies at a[i·ld + k] or at a[k·ld + i].
struct Operand {
  const float* a;
  int64_t ld;
  bool by_columns;

  Operand from(int64_t row) const { return {a + row * (by_columns ? 1 : ld), ld, by_columns}; }
};

struct Result {
  float* c;
  int64_t ld, columns;  // at most kPanel
  bool add;             // to what is there, or not
};

// `rows` ≤ kTile rows of C (+)= A·B. The sums of kPart terms each are added up apart: one running sum of thousands of terms
// would lose digits to rounding.
template <int rows, bool by_columns>
void tile(int64_t depth, const float* a, int64_t ld, const float* panel, const Result& out, int64_t row) {
  __m512 total[rows][4] = {};
  for (int64_t begin = 0; begin < depth; begin += kPart) {
    const int64_t end = std::min(depth, begin + kPart);
    __m512 sums[rows][4] = {};
    for (int64_t k = begin; k < end; ++k) {
      __m512 b[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) b[j] = _mm512_load_ps(panel + k * kPanel + 16 * j);
#pragma GCC unroll 6
      for (int i = 0; i < rows; ++i) {
        const __m512 factor = _mm512_set1_ps(by_columns ? a[k * ld + i] : a[i * ld + k]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[i][j] = _mm512_fmadd_ps(factor, b[j], sums[i][j]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) total[i][j] = _mm512_add_ps(total[i][j], sums[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      float* c = out.c + (row + i) * out.ld + 16 * j;
      const __mmask16 mask = lanes(out.columns - 16 * j);
      const __m512 before = out.add ? _mm512_maskz_loadu_ps(mask, c) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(c, mask, _mm512_add_ps(before, total[i][j]));
    }
  }
}

template <int rows>
void tile(int64_t depth, const Operand& a, const float* panel, const Result& out, int64_t row) {
  a.by_columns ? tile<rows, true>(depth, a.a, a.ld, panel, out, row) : tile<rows, false>(depth, a.a, a.ld, panel, out, row);
}

// C[rows, columns] (+)= A[rows, depth]·B, B one panel.
void product(int64_t rows, int64_t depth, const Operand& a, const float* panel, const Result& out) {
  static constexpr decltype(&tile<1>) kTiles[kTile] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};
  for (int64_t i = 0; i < rows; i += kTile) {
    kTiles[std::min(kTile, rows - i) - 1](depth, a.from(i), panel, out, i);
  }
}

// A panel whose columns are rows of w: w is [rows ≤ 64, depth]; zeros up to 64 columns. Room for a multiple of 16 in depth.
void pack_transposed(const float* w, int64_t ld, int64_t rows, int64_t depth, float* panel) {
  for (int64_t n = 0; n < kPanel; n += 16) {
    for (int64_t k = 0; k < depth; k += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        block[i] = _mm512_maskz_loadu_epi32(n + i < rows ? lanes(depth - k) : 0, w + (n + i) * ld + k);
      }
      pact_fast::transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_store_si512(panel + (k + i) * kPanel + n, block[i]);
    }
  }
}

// The first `columns` ≤ `wide` columns of b [rows, ·] with nothing between the rows; zeros up to `wide`.
void pack(const float* b, int64_t ld, int64_t rows, int64_t columns, int64_t wide, float* packed) {
  for (int64_t k = 0; k < rows; ++k) {
    for (int64_t n = 0; n < wide; n += 16) {
      _mm512_store_ps(packed + k * wide + n, _mm512_maskz_loadu_ps(lanes(columns - n), b + k * ld + n));
    }
  }
}

bool ready() { return true; }

void logits(const float* x, const float* weight, float* z, int64_t rows, int64_t vocab, int64_t width, int64_t z_stride) {
  share<float>(ceil_div(vocab, kPanel), std::min(round_up(width, 16), kDepth) * kPanel, [&](int64_t unit, float* panel) {
    const int64_t v = unit * kPanel, columns = std::min(kPanel, vocab - v);
    for (int64_t k = 0; k < width; k += kDepth) {
      const int64_t depth = std::min(kDepth, width - k);
      pack_transposed(weight + v * width + k, width, columns, depth, panel);
      product(rows, depth, {x + k, width, false}, panel, {z + v, z_stride, columns, k > 0});
    }
  });
}

// dx and d_weight from up to kDepth rows of dz. dx may be null, d_weight as well.
struct Grads {
  const float* dz;
  int64_t dz_stride;
  const float *x, *weight;
  float *dx, *d_weight;
  bool add;  // to d_weight, or not
  int64_t rows, vocab, width;

  int64_t panels = ceil_div(width, kPanel);
  int64_t parts = 1;       // of the rows of dx
  Buffer<float> x_panels;  // x as B of dW

  void run() {
    // Where the panels of dx are too few for the threads, its rows are split, but no finer than 128, as every part packs
    // the panel of W again.
    const int64_t wanted = ceil_div(4 * torch::stable::get_num_threads(), panels);
    parts = std::clamp<int64_t>(wanted, 1, ceil_div(std::max(rows, int64_t{1}), 128));
    if (d_weight != nullptr) {
      x_panels = buffer<float>(panels * kPanel * rows);
      share<float>(panels, 0, [&](int64_t p, float*) {
        pack(x + p * kPanel, width, rows, std::min(kPanel, width - p * kPanel), kPanel, &x_panels[p * kPanel * rows]);
      });
    }
    for (int64_t v = 0; v < vocab; v += kSlab) slab(v);
  }

  // Both results from the slab at v.
  void slab(int64_t v) {
    const int64_t of_dx = dx == nullptr ? 0 : panels * parts;
    const int64_t of_dw = d_weight == nullptr ? 0 : ceil_div(std::min(kSlab, vocab - v), kTall);
    share<float>(of_dx + of_dw, std::max(kSlab * kPanel, rows * kTall), [&](int64_t u, float* scratch) {
      u < of_dx ? input_grad(v, u, scratch) : weight_grad(v + kTall * (u - of_dx), scratch);
    });
  }

  // One panel of columns of dx, the rows of one part.
  void input_grad(int64_t v, int64_t unit, float* panel) {
    const int64_t size = round_up(ceil_div(rows, parts), kTile), i = unit % parts * size, column = unit / parts * kPanel;
    if (i >= rows) return;
    const int64_t depth = std::min(kSlab, vocab - v), columns = std::min(kPanel, width - column);
    pack(weight + v * width + column, width, depth, columns, kPanel, panel);
    const Result part{dx + i * width + column, width, columns, v > 0};
    product(std::min(size, rows - i), depth, {dz + i * dz_stride + v, dz_stride, false}, panel, part);
  }

  // The kTall rows of dW at v.
  void weight_grad(int64_t v, float* columns_of_dz) {
    const int64_t tall = std::min(kTall, vocab - v);
    pack(dz + v, dz_stride, rows, tall, kTall, columns_of_dz);
    for (int64_t column = 0; column < width; column += kPanel) {
      product(tall, rows, {columns_of_dz, kTall, true}, &x_panels[column * rows],
              {d_weight + v * width + column, width, std::min(kPanel, width - column), add});
    }
  }
};

void grads(const float* dz, int64_t dz_stride, const float* x, const float* weight, float* dx, float* d_weight, bool add,
           int64_t rows, int64_t vocab, int64_t width) {
  Grads{dz, dz_stride, x, weight, dx, d_weight, add, rows, vocab, width}.run();
}

#else  // callers ask fp32_products_ready first

bool ready() { return false; }
void logits(const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t) {}
void grads(const float*, int64_t, const float*, const float*, float*, float*, bool, int64_t, int64_t, int64_t) {}

#endif

float* data(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// Rows may be further apart than they are long.
bool is_rows(const Tensor& t, int64_t rows, int64_t columns) {
  return t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && columns > 0 &&
         t.stride(1) == 1;
}

bool is_whole(const Tensor& t, int64_t rows, int64_t columns) { return is_rows(t, rows, columns) && t.is_contiguous(); }

void check(const Tensor& x, const Tensor& weight, const Tensor& z) {
  STD_TORCH_CHECK(ready(), "no fp32 products here");
  STD_TORCH_CHECK(is_whole(x, x.size(0), x.size(1)) && is_whole(weight, weight.size(0), x.size(1)),
                  "x and weight: contiguous fp32 matrices of one width");
  STD_TORCH_CHECK(is_rows(z, x.size(0), weight.size(0)), "z and dz: fp32, a row for each of x, a column for each row of weight");
}

}  // namespace

bool fp32_products_ready() { return ready(); }

// z ← x·Wᵀ: x [n, D], weight [V, D] contiguous; z [n, V], rows contiguous; all fp32.
void fp32_logits(const Tensor x, const Tensor weight, Tensor z) {
  check(x, weight, z);
  logits(data(x), data(weight), data(z), x.size(0), weight.size(0), x.size(1), z.stride(0));
}

// dx ← dz·W and d_weight ← or, if `add`, += dzᵀ·x: dz [n, V] with contiguous rows; dx [n, D]; d_weight [V, D]; all fp32.
void fp32_grads(const Tensor dz, const Tensor x, const Tensor weight, std::optional<Tensor> dx,
                std::optional<Tensor> d_weight, bool add) {
  const int64_t rows = x.size(0), vocab = weight.size(0), width = x.size(1);
  check(x, weight, dz);
  STD_TORCH_CHECK(!dx || is_whole(*dx, rows, width), "dx: contiguous, fp32, of the shape of x");
  STD_TORCH_CHECK(!d_weight || is_whole(*d_weight, vocab, width), "d_weight: contiguous, fp32, of the shape of weight");
  for (int64_t i = 0; i < rows; i += kDepth) {
    grads(data(dz) + i * dz.stride(0), dz.stride(0), data(x) + i * width, data(weight),
          dx ? data(*dx) + i * width : nullptr, d_weight ? data(*d_weight) : nullptr, add || i > 0,
          std::min(kDepth, rows - i), vocab, width);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("fp32_products_ready() -> bool");
  m.def("fp32_logits(Tensor x, Tensor weight, Tensor(a!) z) -> ()");
  m.def("fp32_grads(Tensor dz, Tensor x, Tensor weight, Tensor(a!)? dx, Tensor(b!)? d_weight, bool add) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CompositeExplicitAutograd, m) {
  m.impl("fp32_products_ready", TORCH_BOX(&fp32_products_ready));
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) {
  m.impl("fp32_logits", TORCH_BOX(&fp32_logits));
  m.impl("fp32_grads", TORCH_BOX(&fp32_grads));
}
