// Tests of csrc/common: scratch capacity, and errors in parallel_for_dynamic. Exits with 0, or 1 and a message per failure.

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>

#include "common/parallel.h"
#include "common/scratch.h"

using namespace pact_fast;

static int failures = 0;

static void expect(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

template <typename Run>
static std::string error_of(const Run& run) {
  try {
    run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

static void test_scratch() {
  const auto layout = [](ScratchArena& arena) {
    arena.take<float>(3);
    return arena.take<char>(65);
  };
  expect(scratch_bytes(layout) == 64 + 128, "pieces take whole cache lines");
  const auto memory = aligned_buffer<char>(192);
  ScratchArena exact(memory.get(), 192);
  expect(layout(exact) == memory.get() + 64, "the second piece follows the first");
  expect(error_of([&] { exact.take<char>(1); }).find("scratch overflow, 256 of 192 bytes") != std::string::npos,
         "a take beyond the capacity is an error");
  ScratchArena small(memory.get(), 191);
  expect(!error_of([&] { layout(small); }).empty(), "a layout larger than its memory is an error");
  ScratchArena negative(memory.get(), 192);
  expect(!error_of([&] { negative.take<char>(-1); }).empty(), "a negative count is an error");
}

// A layout that takes more on the second run than on the first, which counts.
static void test_layout_that_grows() {
  std::atomic<int> runs{0};
  const auto layout = [&](ScratchArena& arena) { return arena.take<float>(runs++ == 0 ? 16 : 17); };
  const std::string error = error_of([&] { parallel_for_dynamic(4, layout, [](int64_t, float*) {}); });
  expect(error.find("scratch overflow") != std::string::npos, "parallel_for_dynamic checks the capacity");
}

static void test_units() {
  std::atomic<int64_t> sum{0};
  const auto layout = [](ScratchArena& arena) { return arena.take<int64_t>(1); };
  parallel_for_dynamic(1000, layout, [&](int64_t unit, int64_t* scratch) {
    *scratch = unit;
    sum += *scratch;
  });
  expect(sum == 499500, "every unit runs once");
  parallel_for_dynamic(0, [&](int64_t) { expect(false, "no units, no work"); });
}

// Unit 0 fails while a unit on another thread waits for it, as one for its ticket: the wait must end.
static void test_error_while_others_wait() {
  std::atomic<bool> waiting{false};
  FirstError error;
  const auto none = [](ScratchArena&) { return NoScratch{}; };
  const auto work = [&](int64_t unit, NoScratch&) {
    if (unit == 0) {
      while (!waiting && torch::stable::get_num_threads() > 1) std::this_thread::yield();
      throw std::runtime_error("unit 0");
    }
    waiting = true;
    while (!error.raised()) std::this_thread::yield();
    throw std::runtime_error("stopped");
  };
  expect(error_of([&] { parallel_for_dynamic(8, none, work, error); }) == "unit 0", "the first error is rethrown");
  std::atomic<int> ran{0};
  expect(!error_of([&] {
            parallel_for_dynamic(1000, [&](int64_t) {
              ++ran;
              throw std::runtime_error("all");
            });
          }).empty(),
         "errors of units without scratch are rethrown");
  expect(ran < 1000, "the remaining units are skipped");
}

int main() {
  test_scratch();
  test_layout_that_grows();
  test_units();
  test_error_while_others_wait();
  if (failures == 0) std::printf("ok, %u threads\n", torch::stable::get_num_threads());
  return failures != 0;
}
