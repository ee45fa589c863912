// What tree attention on CPU works on, and who sees whom.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "work.h"

namespace pact_fast::attention {

constexpr int64_t kTile = 64;  // keys and rows of a tile of scores

// A matrix [rows, width] for each head.
template <typename T>
struct Heads {
  T* data;
  int64_t head, row;  // strides

  T* at(int64_t h, int64_t i) const { return data + h * head + i * row; }
};

// q [heads, rows, width], k and v [groups, keys, width]. Row i stands where key `after + i` does.
struct Sizes {
  int64_t heads, groups, rows, keys, width;
  float scale;

  int64_t after() const { return keys - rows; }
};

template <typename T>
struct Inputs {
  Heads<const T> q, k, v;
  const int64_t* end;  // [keys], in the numbering of keys
  Sizes size;
};

// Who sees whom, tile by tile.
class Mask {
 public:
  Mask(const int64_t* end, const Sizes& size) : size_(size), tiles_(ceil_div(size.keys, kTile)), end_(tiles_ * kTile, 0) {
    std::copy_n(end, size.keys, end_.begin());  // nobody sees what is beyond the last key
    for (int64_t t = 0; t < tiles_; ++t) {
      const auto [low, high] = std::minmax_element(end_.begin() + t * kTile, end_.begin() + (t + 1) * kTile);
      low_.push_back(*low);
      high_.push_back(*high);
    }
  }

  int64_t key_tiles() const { return tiles_; }
  int64_t row_tiles() const { return ceil_div(size_.rows, kTile); }

  // Whether any row of a tile may see any key of one.
  bool some(int64_t keys, int64_t rows) const { return keys * kTile < first(rows + 1) && first(rows) < high_[keys]; }

  // Whether all of a whole tile see all of one.
  bool all(int64_t keys, int64_t rows) const { return (keys + 1) * kTile <= first(rows) + 1 && first(rows + 1) <= low_[keys]; }

  // [kTile] for each key the rows that see it.
  void write(int64_t keys, int64_t rows, uint64_t* seen) const {
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t key = keys * kTile + i;
      seen[i] = below(end_[key] - first(rows)) & ~below(key - first(rows));
    }
  }

 private:
  // Where the first row of a tile stands among the keys.
  int64_t first(int64_t rows) const { return size_.after() + rows * kTile; }

  static uint64_t below(int64_t count) { return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1; }

  Sizes size_;
  int64_t tiles_;
  std::vector<int64_t> end_, low_, high_;
};

}  // namespace pact_fast::attention
