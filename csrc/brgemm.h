// oneDNN's block product C (+)= A·B with fp32 sums (AMX, AVX512-BF16 or AVX-512), as libtorch_cpu exports it.
//
// It is not part of torch's stable ABI, hence the weak symbols and `brgemm_ready`: where it is not there, or does not do
// what we expect of it, callers have to take another way.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <type_traits>

namespace at::native::cpublas {
[[gnu::weak]] void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool pairs);
[[gnu::weak]] void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const float* a, const float* b, float* c, bool pairs);
[[gnu::weak]] void brgemm_release(bool pairs);
}  // namespace at::native::cpublas

namespace pact_fast {

using Bits = uint16_t;  // a bf16 number

// C[m, n] (+)= A[m, k]·B. A by rows. B of fp32 by rows, too; of bf16 as pairs of rows, B[k/2][n][2], k even.
inline void brgemm(int64_t m, int64_t n, int64_t k, const Bits* a, int64_t lda, const Bits* b, int64_t ldb, float* c,
                   int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

inline void brgemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, false);
}

// AMX tiles stay configured after a product. A thread of torch's pool has to be left without: the configuration is part of
// its state, slows down every switch between threads, and is not the one that other users of the tiles expect.
struct Tiles {
  ~Tiles() { at::native::cpublas::brgemm_release(true); }
};

// Whether the block product of numbers T is there and means by its arguments what we mean.
template <typename T>
bool brgemm_ready() {
  using Number = std::conditional_t<std::is_same_v<T, float>, float, c10::BFloat16>;
  void (*const product)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const Number*, const Number*, float*,
                        bool) = at::native::cpublas::brgemm;
  if (product == nullptr || at::native::cpublas::brgemm_release == nullptr) return false;
  constexpr int64_t wide = 64, in_pairs = sizeof(T) == 2;
  alignas(64) Number a[2 * 4], b[4 * wide];
  float c[2 * 5];
  for (int i = 0; i < 8; ++i) a[i] = static_cast<float>(i + 1);
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < wide; ++j) {
      b[in_pairs ? (k & ~1) * wide + 2 * j + (k & 1) : k * wide + j] = static_cast<float>((k + 1) * (j - 2));
    }
  }
  std::fill(c, c + 10, 1.0f);
  try {
    const Tiles tiles;
    brgemm(2, 5, 4, reinterpret_cast<const T*>(a), 4, reinterpret_cast<const T*>(b), wide, c, 5, true);
  } catch (const std::exception&) {  // without oneDNN: switched off by the user, or not built in
    return false;
  }
  for (int i = 0; i < 10; ++i) {
    const int row_sum = i < 5 ? 1 + 4 + 9 + 16 : 5 + 12 + 21 + 32;
    if (c[i] != static_cast<float>(1 + row_sum * (i % 5 - 2))) return false;
  }
  return true;
}

}  // namespace pact_fast
