// parallel_for_dynamic: units of work for the threads of torch's pool, dynamically scheduled, with per-thread scratch.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>

#include "scratch.h"

namespace pact_fast {

// The first exception of a parallel region. Other threads poll raised() and stop.
class FirstError {
 public:
  // Keeps the exception that is being handled; call it from a catch block.
  void capture() noexcept {
    const std::lock_guard lock(mutex_);
    if (error_ == nullptr) error_ = std::current_exception();
    raised_.store(true, std::memory_order_release);
  }

  bool raised() const noexcept { return raised_.load(std::memory_order_relaxed); }

  void rethrow_if_raised() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  std::atomic<bool> raised_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

struct NoGuard {};
struct NoScratch {};

// Runs work(unit, scratch) for every unit in [0, units), each on whichever thread is free: with static shares, all
// would wait for a thread whose core another process keeps busy. Every output element belongs to one unit, so
// results do not depend on the schedule. Units start in increasing order.
//
//   Guard    constructed on every thread for as long as it works (AmxTileGuard)
//   layout   layout(ScratchArena&) takes a thread's scratch and returns it, by pointer or as a struct of pointers
//   error    receives the first exception of a unit; the remaining units are skipped and it is rethrown on the caller's
//            thread. A unit that waits for another one must poll error.raised().
template <typename Guard = NoGuard, typename Layout, typename Work>
void parallel_for_dynamic(int64_t units, const Layout& layout, const Work& work, FirstError& error) {
  std::atomic<int64_t> next{0};
  const int64_t bytes = scratch_bytes(layout, kRedZone),
                threads = std::min<int64_t>(units, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      [[maybe_unused]] const Guard guard;
      const auto memory = aligned_buffer<char>(bytes);
      ScratchArena arena(memory.get(), bytes, kRedZone);
      [[maybe_unused]] auto scratch = layout(arena);
      for (int64_t unit; !error.raised() && (unit = next.fetch_add(1, std::memory_order_relaxed)) < units;) {
        work(unit, scratch);
      }
    } catch (...) {
      error.capture();
    }
  });
  error.rethrow_if_raised();
}

template <typename Guard = NoGuard, typename Layout, typename Work>
void parallel_for_dynamic(int64_t units, const Layout& layout, const Work& work) {
  FirstError error;
  parallel_for_dynamic<Guard>(units, layout, work, error);
}

// Without scratch: work(unit).
template <typename Guard = NoGuard, typename Work>
void parallel_for_dynamic(int64_t units, const Work& work) {
  parallel_for_dynamic<Guard>(
      units, [](ScratchArena&) { return NoScratch{}; }, [&](int64_t unit, NoScratch&) { work(unit); });
}

}  // namespace pact_fast
