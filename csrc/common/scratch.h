// Aligned buffers and per-thread scratch memory.
//
// A scratch layout is a function that takes its pieces from a ScratchArena. It runs twice: once on a counting
// arena, which gives the size, and once on the memory of that size. Size and use cannot drift apart, and every take
// is checked.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace pact_fast {

constexpr int64_t kCacheLine = 64;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using AlignedBuffer = std::unique_ptr<T[], FreeDeleter>;

// `count` uninitialised elements, aligned to a cache line. Throws std::bad_alloc.
template <typename T>
AlignedBuffer<T> aligned_buffer(int64_t count) {
  void* p = std::aligned_alloc(kCacheLine, round_up(count * sizeof(T), kCacheLine));
  if (p == nullptr && count > 0) throw std::bad_alloc();
  return AlignedBuffer<T>(static_cast<T*>(p));
}

// Poisoned bytes behind every piece of a thread's scratch, in builds with AddressSanitizer: an access beyond a piece is
// reported although the next piece begins there.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kRedZone = kCacheLine;
inline void poison(const char* begin, const char* end) { __asan_poison_memory_region(begin, end - begin); }
#else
constexpr int64_t kRedZone = 0;
inline void poison(const char*, const char*) {}
#endif

// Bump allocator over memory that it does not own. Pieces are aligned to a cache line, as the memory must be.
class ScratchArena {
 public:
  // Counts only: take() returns nullptr, used() is the size that the same takes need.
  explicit ScratchArena(int64_t red_zone = 0) : red_zone_(red_zone) {}

  ScratchArena(void* base, int64_t capacity, int64_t red_zone = 0)
      : base_(static_cast<char*>(base)), capacity_(capacity), red_zone_(red_zone) {}

  // `count` uninitialised elements. Throws std::length_error beyond the capacity.
  template <typename T>
  T* take(int64_t count) {
    const int64_t begin = used_, bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += round_up(bytes, kCacheLine) + red_zone_;
    if (capacity_ == kCounting) return nullptr;
    if (count < 0 || used_ > capacity_) {
      throw std::length_error("pact_fast: scratch overflow, " + std::to_string(used_) + " of " +
                              std::to_string(capacity_) +
                              " bytes taken: the layout in use is not the one that was counted");
    }
    if (red_zone_ > 0) poison(base_ + begin + bytes, base_ + used_);
    return reinterpret_cast<T*>(base_ + begin);
  }

  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kCounting = -1;

  char* base_ = nullptr;
  int64_t capacity_ = kCounting, used_ = 0, red_zone_ = 0;
};

// Bytes that a layout takes.
template <typename Layout>
int64_t scratch_bytes(const Layout& layout, int64_t red_zone = 0) {
  ScratchArena arena(red_zone);
  layout(arena);
  return arena.used();
}

}  // namespace pact_fast
