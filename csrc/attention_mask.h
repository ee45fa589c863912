// Inputs of tree attention on CPU, and its mask by tiles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/scratch.h"
#include "common/tensor.h"

namespace pact_fast::attention {

constexpr int64_t kTile = 64;  // keys and query rows of a tile of scores

// q [heads, rows, head_dim]; k and v [kv_heads, keys, head_dim]. Query row i stands at position prefix() + i of the
// keys.
struct AttentionShape {
  int64_t heads, kv_heads, rows, keys, head_dim;
  float scale;

  int64_t prefix() const { return keys - rows; }
  int64_t padded_rows() const { return round_up(rows, kTile); }
};

template <typename T>
struct AttentionInputs {
  HeadView<const T> q, k, v;
  const int64_t* end;  // [keys]: key k is visible to query positions in [k, end[k])
  AttentionShape shape;
};

// Which tiles of keys are visible to which tiles of query rows.
class TreeMask {
 public:
  TreeMask(const int64_t* end, const AttentionShape& shape)
      : shape_(shape), tiles_(ceil_div(shape.keys, kTile)), end_(tiles_ * kTile, 0) {
    std::copy_n(end, shape.keys, end_.begin());  // padding keys are visible to no row
    for (int64_t t = 0; t < tiles_; ++t) {
      const auto [low, high] = std::minmax_element(end_.begin() + t * kTile, end_.begin() + (t + 1) * kTile);
      min_end_.push_back(*low);
      max_end_.push_back(*high);
    }
  }

  int64_t key_tiles() const { return tiles_; }
  int64_t row_tiles() const { return ceil_div(shape_.rows, kTile); }

  // False only if no row of the row tile sees any key of the key tile.
  bool any_visible(int64_t key_tile, int64_t row_tile) const {
    return key_tile * kTile < position(row_tile + 1) && position(row_tile) < max_end_[key_tile];
  }

  // True if all kTile rows see all kTile keys.
  bool all_visible(int64_t key_tile, int64_t row_tile) const {
    return (key_tile + 1) * kTile <= position(row_tile) + 1 && position(row_tile + 1) <= min_end_[key_tile];
  }

  // bits [kTile]: bit r of bits[k] is set if row r of the row tile sees key k of the key tile.
  void row_bits(int64_t key_tile, int64_t row_tile, uint64_t* bits) const {
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t key = key_tile * kTile + i;
      bits[i] = low_bits(end_[key] - position(row_tile)) & ~low_bits(key - position(row_tile));
    }
  }

 private:
  // Position among the keys of the first row of a tile.
  int64_t position(int64_t row_tile) const { return shape_.prefix() + row_tile * kTile; }

  static uint64_t low_bits(int64_t count) {
    return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
  }

  AttentionShape shape_;
  int64_t tiles_;
  std::vector<int64_t> end_, min_end_, max_end_;
};

}  // namespace pact_fast::attention
