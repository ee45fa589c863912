// Fingerprints of weights (kernels/fingerprint.py): Σ bits_ij·a_i·b_j mod 2⁶⁴, in one pass over memory.
//
// Integer sums are exact, so neither vector width nor the order of rows changes the result.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "common/tensor.h"

namespace pact_fast {
namespace {

constexpr int64_t kUnit = 1 << 15;  // elements per unit of work

// Unsigned, as signed overflow is undefined; sign-extended first, as the integers of torch are.
template <typename T>
uint64_t weighted_sum(const T* bits, const uint64_t* b, int64_t n) {
  uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += static_cast<uint64_t>(static_cast<int64_t>(bits[j])) * b[j];
  return sum;
}

template <typename T>
void fingerprint_rows(const T* bits, int64_t stride, const uint64_t* a, const uint64_t* b, int64_t rows, int64_t width,
                      uint64_t* out) {
  const int64_t each = std::max<int64_t>(kUnit / std::max<int64_t>(width, 1), 1);
  parallel_for_dynamic(ceil_div(rows, each), [&](int64_t unit) {
    for (int64_t i = unit * each; i < std::min(rows, (unit + 1) * each); ++i) {
      out[i] = a[i] * weighted_sum(bits + i * stride, b, width);
    }
  });
}

// out_i ← a_i·Σ_j bits_ij·b_j. bits [R, C] of int8, int16 or int32 with contiguous rows; a and out int64 [R], b int64 [C].
void fingerprint(const Tensor bits, const Tensor a, const Tensor b, Tensor out) {
  STD_TORCH_CHECK(bits.dim() == 2, "pact_fast: bits must be a matrix");
  const int64_t rows = bits.size(0), width = bits.size(1);
  check_rows(bits, bits.scalar_type(), rows, width, "bits");
  check_vector(a, ScalarType::Long, rows, "a");
  check_vector(b, ScalarType::Long, width, "b");
  check_vector(out, ScalarType::Long, rows, "out");
  const auto run = [&]<typename T>(T) {
    fingerprint_rows<T>(data_ptr<T>(bits), bits.stride(0), data_ptr<uint64_t>(a), data_ptr<uint64_t>(b), rows, width,
                        data_ptr<uint64_t>(out));
  };
  switch (bits.scalar_type()) {
    case ScalarType::Char: return run(int8_t{});
    case ScalarType::Short: return run(int16_t{});
    case ScalarType::Int: return run(int32_t{});
    default: STD_TORCH_CHECK(false, "pact_fast: bits must be int8, int16 or int32");
  }
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("fingerprint(Tensor bits, Tensor a, Tensor b, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) { m.impl("fingerprint", TORCH_BOX(&pact_fast::fingerprint)); }
