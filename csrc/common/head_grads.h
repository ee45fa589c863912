// The loop nest of the head's backward GEMMs, shared by fp32 and bf16:
//
//     dX[n, D] = dZ·W        dW[V, D] (+)= dZᵀ·X
//
//  * dZ [n, V] is cut into blocks of kKC columns: the depth of dX, the rows of dW. A block stays in L3 for both GEMMs.
//  * A unit of work is a panel of kNR columns of dX, for some of its rows, or kMC rows of dW. Every output element
//    belongs to one unit per block and blocks follow each other, so sums run in the order of K whatever thread
//    takes a unit.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "parallel.h"

namespace pact_fast {

struct HeadShape {
  int64_t rows, vocab, width;  // n, V, D
};

constexpr int64_t kMinSplitRows = 128;  // every part of dX's rows packs the panel of W again: no finer parts than this

// Kernel has
//
//     kNR, kKC, kMC, kRowAlign   block sizes; the rows of dX are split at multiples of kRowAlign
//     Guard                      held by every thread that works
//     shape, wants_dx(), wants_dw()
//     layout(arena)              scratch of a thread
//     pack_units(), pack(u)      before the first block: packs X, prepares block 0 of dZ
//     next_units(), next(v, u)   prepares the block of dZ at column v, while the one before it is worked on
//     input_grad(v, row, rows, column, next_column, scratch)   rows × kNR of dX; next_column is likely its next one
//     weight_grad(v, row, rows, scratch)                       `rows` rows of dW from v + row on
template <typename Kernel>
void run_head_grads(Kernel& kernel) {
  const int64_t rows = kernel.shape.rows, vocab = kernel.shape.vocab, width = kernel.shape.width;
  const int64_t panels = ceil_div(width, Kernel::kNR), threads = torch::stable::get_num_threads();
  // If dX has fewer panels than there are threads, its rows are split as well.
  const int64_t splits =
      std::clamp<int64_t>(ceil_div(4 * threads, panels), 1, ceil_div(std::max(rows, int64_t{1}), kMinSplitRows));
  const int64_t split_rows = round_up(ceil_div(rows, splits), Kernel::kRowAlign);
  using Guard = typename Kernel::Guard;
  parallel_for_dynamic<Guard>(kernel.pack_units(), [&](int64_t u) { kernel.pack(u); });
  const auto layout = [&](ScratchArena& arena) { return kernel.layout(arena); };
  for (int64_t v = 0; v < vocab; v += Kernel::kKC) {
    const int64_t block = std::min(Kernel::kKC, vocab - v);
    const int64_t dx_units = kernel.wants_dx() ? panels * splits : 0;
    const int64_t dw_units = kernel.wants_dw() ? ceil_div(block, Kernel::kMC) : 0;
    const int64_t next_units = v + Kernel::kKC < vocab ? kernel.next_units() : 0;
    parallel_for_dynamic<Guard>(dx_units + dw_units + next_units, layout, [&](int64_t u, auto& scratch) {
      if (u < dx_units) {
        const int64_t row = u % splits * split_rows, column = u / splits * Kernel::kNR;
        const int64_t next_column = (u + threads) / splits * Kernel::kNR;
        if (row < rows) kernel.input_grad(v, row, std::min(split_rows, rows - row), column, next_column, scratch);
      } else if (u < dx_units + dw_units) {
        const int64_t row = Kernel::kMC * (u - dx_units);
        kernel.weight_grad(v, row, std::min(Kernel::kMC, block - row), scratch);
      } else {
        kernel.next(v + Kernel::kKC, u - dx_units - dw_units);
      }
    });
  }
}

}  // namespace pact_fast
