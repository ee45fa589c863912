// oneDNN's BRGEMM micro-kernel, C (+)= A·B with fp32 accumulation (AMX, AVX512-BF16 or AVX-512), as libtorch_cpu
// exports it.
//
// It is not part of torch's stable ABI, so it needs the weak symbols and the self-test of brgemm_ready(): if the symbol
// is missing or computes something else, callers must take another path.

#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <type_traits>

#include "bf16.h"

namespace at::native::cpublas {
[[gnu::weak]] void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add_c,
                          const c10::BFloat16* a, const c10::BFloat16* b, float* c, bool is_vnni);
[[gnu::weak]] void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add_c,
                          const float* a, const float* b, float* c, bool is_vnni);
[[gnu::weak]] void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas

namespace pact_fast {

// C[m, n] (+)= A[m, k]·B[k, n]. A is row-major with leading dimension lda. B is row-major in fp32; in bf16 it is in
// VNNI layout, B[k/2][ldb][2] with k even.
inline void brgemm(int64_t m, int64_t n, int64_t k, const bf16_t* a, int64_t lda, const bf16_t* b, int64_t ldb,
                   float* c, int64_t ldc, bool add_c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add_c, reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}

inline void brgemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                   int64_t ldc, bool add_c) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add_c, a, b, c, false);
}

// Releases the AMX tile configuration of this thread at the end of a scope. brgemm leaves the tiles configured; on
// a thread of torch's pool that slows down every context switch and breaks other users of the tiles.
struct AmxTileGuard {
  ~AmxTileGuard() { at::native::cpublas::brgemm_release(true); }
};

// True if BRGEMM is available for T (float or bf16_t) and passes a numerical self-test.
template <typename T>
bool brgemm_ready() {
  using Element = std::conditional_t<std::is_same_v<T, float>, float, c10::BFloat16>;
  void (*const kernel)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const Element*, const Element*,
                       float*, bool) = at::native::cpublas::brgemm;
  if (kernel == nullptr || at::native::cpublas::brgemm_release == nullptr) return false;
  constexpr int64_t ldb = 64, is_vnni = sizeof(T) == 2;
  alignas(64) Element a[2 * 4], b[4 * ldb];
  float c[2 * 5];
  for (int i = 0; i < 8; ++i) a[i] = static_cast<float>(i + 1);
  for (int k = 0; k < 4; ++k) {
    for (int j = 0; j < ldb; ++j) {
      b[is_vnni ? (k & ~1) * ldb + 2 * j + (k & 1) : k * ldb + j] = static_cast<float>((k + 1) * (j - 2));
    }
  }
  std::fill(c, c + 10, 1.0f);
  try {
    const AmxTileGuard guard;
    brgemm(2, 5, 4, reinterpret_cast<const T*>(a), 4, reinterpret_cast<const T*>(b), ldb, c, 5, true);
  } catch (const std::exception&) {  // torch was built without oneDNN, or the user disabled it
    return false;
  }
  for (int i = 0; i < 10; ++i) {
    const int row_sum = i < 5 ? 1 + 4 + 9 + 16 : 5 + 12 + 21 + 32;
    if (c[i] != static_cast<float>(1 + row_sum * (i % 5 - 2))) return false;
  }
  return true;
}

}  // namespace pact_fast
