// Inputs of tree attention on CPU, and its mask by tiles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/scratch.h"
#include "common/tensor.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

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

// Transformations of a layer's scores after scaling.
struct ScoreRule {
  const int64_t* position;  // [keys], of each key on its path; read if there is a window
  int64_t window;           // a row sees keys at most window − 1 positions before its own; 0: all of them
  float softcap;            // score s becomes softcap·tanh(s / softcap); 0: unchanged
  const float* sinks;       // [heads]: one more score per head, without a value; nullptr: none
};

template <typename T>
struct AttentionInputs {
  HeadView<const T> q, k, v;
  const int64_t* end;  // [keys]: key k is visible to query positions in [k, end[k])
  AttentionShape shape;
  ScoreRule rule;
};

// Which tiles of keys are visible to which tiles of query rows.
class TreeMask {
 public:
  TreeMask(const int64_t* end, const AttentionShape& shape, const ScoreRule& rule)
      : shape_(shape), tiles_(ceil_div(shape.keys, kTile)), end_(tiles_ * kTile, 0), window_(rule.window) {
    if (window_ > 0) {
      key_position_.assign(rule.position, rule.position + shape.keys);
      row_position_.assign(rule.position + shape.prefix(), rule.position + shape.keys);
      key_range_ = tile_ranges(key_position_);
      row_range_ = tile_ranges(row_position_);
    }
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
    return key_tile * kTile < position(row_tile + 1) && position(row_tile) < max_end_[key_tile] &&
           (window_ == 0 || row_range_[row_tile].low - key_range_[key_tile].high < window_);
  }

  // True if all kTile rows see all kTile keys.
  bool all_visible(int64_t key_tile, int64_t row_tile) const {
    return (key_tile + 1) * kTile <= position(row_tile) + 1 && position(row_tile + 1) <= min_end_[key_tile] &&
           (window_ == 0 || row_range_[row_tile].high - key_range_[key_tile].low < window_);
  }

  // bits [kTile]: bit r of bits[k] is set if row r of the row tile sees key k of the key tile.
  void row_bits(int64_t key_tile, int64_t row_tile, uint64_t* bits) const {
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t key = key_tile * kTile + i;
      bits[i] = low_bits(end_[key] - position(row_tile)) & ~low_bits(key - position(row_tile));
      if (window_ > 0 && bits[i] != 0) bits[i] &= near_bits(row_tile, key_position_[key] + window_);
    }
  }

 private:
  struct Range {
    int64_t low, high;
  };

  // Lowest and highest position in each tile; pads the positions to whole tiles.
  static std::vector<Range> tile_ranges(std::vector<int64_t>& positions) {
    std::vector<Range> ranges;
    const auto count = static_cast<int64_t>(positions.size());
    for (int64_t first = 0; first < count; first += kTile) {
      const auto begin = positions.begin() + first;
      const auto [low, high] = std::minmax_element(begin, begin + std::min(kTile, count - first));
      ranges.push_back({*low, *high});
    }
    positions.resize(round_up(count, kTile), 0);
    return ranges;
  }

  // Bits of the rows of a tile at positions below `limit`.
  uint64_t near_bits(int64_t row_tile, int64_t limit) const {
    const int64_t* rows = row_position_.data() + row_tile * kTile;
    uint64_t bits = 0;
#ifdef __AVX512F__
    for (int64_t r = 0; r < kTile; r += 8) {
      const __mmask8 part = _mm512_cmplt_epi64_mask(_mm512_loadu_si512(rows + r), _mm512_set1_epi64(limit));
      bits |= static_cast<uint64_t>(part) << r;
    }
#else
    for (int64_t r = 0; r < kTile; ++r) bits |= static_cast<uint64_t>(rows[r] < limit) << r;
#endif
    return bits;
  }

  // Position among the keys of the first row of a tile.
  int64_t position(int64_t row_tile) const { return shape_.prefix() + row_tile * kTile; }

  static uint64_t low_bits(int64_t count) {
    return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
  }

  AttentionShape shape_;
  int64_t tiles_;
  std::vector<int64_t> end_, min_end_, max_end_;
  int64_t window_;
  std::vector<int64_t> key_position_, row_position_;
  std::vector<Range> key_range_, row_range_;
};

}  // namespace pact_fast::attention
