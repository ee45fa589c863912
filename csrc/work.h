// Units of work for the threads of torch's pool, and the memory they need.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace pact_fast {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised, at the beginning of a cache line.
template <typename T>
Buffer<T> buffer(int64_t count) {
  void* p = std::aligned_alloc(64, round_up(count * sizeof(T), 64));
  if (p == nullptr && count > 0) throw std::bad_alloc();
  return Buffer<T>(static_cast<T*>(p));
}

struct Stateless {};

// work(unit, scratch) for every unit, each by whichever thread is free: equal shares would wait for a thread that another
// program keeps from its core. A unit owns its elements, so that results do not depend on who does it. Every thread has
// `scratch` numbers T for itself, and a State while it works.
template <typename T, typename State = Stateless, typename Work>
void share(int64_t units, int64_t scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    [[maybe_unused]] const State state;
    const auto mine = buffer<T>(scratch);
    for (int64_t unit; (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) work(unit, mine.get());
  });
}

}  // namespace pact_fast
