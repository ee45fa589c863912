// Sampling on CPU: one token of each row of logits by inverse CDF, and its log-prob.
//
//     p = exp((z − max z) / T),   the first token whose cumulated p exceeds u·Σp,   log-prob = (z − max z) / T − log Σp
//
// A chain of torch ops passes over the logits of all rows ten times. Here a row is read from memory once: it stays in L2
// for the second pass, which sums p by blocks. Only the block that holds the token is cumulated token by token. Sums are in
// fp64. Results depend on neither the number of rows nor of threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/exp.h"
#include "common/parallel.h"
#include "common/tensor.h"

namespace pact_fast {
namespace {

constexpr int64_t kBlock = 256;  // tokens
constexpr int kLanes = 16;       // sums that run side by side, so that the compiler vectorises them

float row_max(const float* z, int64_t size) {
  float result = -INFINITY;
#pragma omp simd reduction(max : result)
  for (int64_t i = 0; i < size; ++i) result = std::max(result, z[i]);
  return result;
}

// p of `size` ≤ kBlock tokens; 0 behind them.
void block_weights(const float* z, int64_t size, float max, float scale, float* p) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) p[i] = exp_fast((z[i] - max) * scale);
  std::fill(p + size, p + kBlock, 0.0f);
}

double block_sum(const float* p) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < kBlock; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) lanes[j] += p[i + j];
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

// The first index at which `before` plus the running sum exceeds `target`, and `before` becomes the sum ahead of it. If
// rounding leaves none, the last one that adds something; if the sums are NaN, the last one.
template <typename T>
int64_t search(const T* terms, int64_t size, double target, double* before) {
  double sum = *before, ahead = sum;
  int64_t last = size - 1;
  for (int64_t i = 0; i < size; ++i) {
    if (sum + terms[i] > target) {
      *before = sum;
      return i;
    }
    if (terms[i] > 0) last = i, ahead = sum;
    sum += terms[i];
  }
  *before = ahead;
  return last;
}

// The token of a row, by inverse CDF, and log Σp. `sums` is scratch for the sums of all blocks.
int64_t draw(const float* z, int64_t size, float max, float scale, double uniform, double* sums, double* total) {
  float p[kBlock];
  const int64_t blocks = ceil_div(size, kBlock);
  *total = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    block_weights(z + b * kBlock, std::min(kBlock, size - b * kBlock), max, scale, p);
    sums[b] = block_sum(p);
    *total += sums[b];
  }
  const double target = std::min(uniform * *total, std::nextafter(*total, 0.0));  // rounding may put it above the total
  double before = 0.0;
  const int64_t first = search(sums, blocks, target, &before) * kBlock, width = std::min(kBlock, size - first);
  block_weights(z + first, width, max, scale, p);
  return first + search(p, width, target, &before);
}

void sample(const Tensor& logits, const Tensor& temperatures, const Tensor& uniforms, const Tensor& tokens,
            const Tensor& logprobs) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "pact_fast: logits must be [n, V]");
  const int64_t rows = logits.size(0), size = logits.size(1);
  check_matrix(logits, ScalarType::Float, rows, size, "logits");
  check_vector(temperatures, ScalarType::Float, rows, "temperatures");
  check_vector(uniforms, ScalarType::Double, rows, "uniforms");
  check_vector(tokens, ScalarType::Long, rows, "tokens");
  check_vector(logprobs, ScalarType::Float, rows, "logprobs");
  const float *z = data_ptr<float>(logits), *temperature = data_ptr<float>(temperatures);
  const double* uniform = data_ptr<double>(uniforms);
  int64_t* token = data_ptr<int64_t>(tokens);
  float* logprob = data_ptr<float>(logprobs);
  const auto layout = [&](ScratchArena& arena) { return arena.take<double>(ceil_div(size, kBlock)); };
  parallel_for_dynamic(rows, layout, [&](int64_t i, double* sums) {
    const float* row = z + i * size;
    const bool greedy = temperature[i] == 0.0f;
    const float max = row_max(row, size), scale = greedy ? 1.0f : 1.0f / temperature[i];
    double total;
    token[i] = draw(row, size, max, scale, uniform[i], sums, &total);
    if (greedy) token[i] = std::min<int64_t>(std::find(row, row + size, max) - row, size - 1);
    logprob[i] = static_cast<float>((row[token[i]] - max) * scale - std::log(total));
  });
}

}  // namespace
}  // namespace pact_fast

STABLE_TORCH_LIBRARY_FRAGMENT(pact_fast, m) {
  m.def("sample(Tensor logits, Tensor temperatures, Tensor uniforms, Tensor(a!) tokens, Tensor(b!) logprobs) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pact_fast, CPU, m) { m.impl("sample", TORCH_BOX(&pact_fast::sample)); }
