// How the bandwidth-bound operators are split among threads, and the sums that their blocks leave.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {

constexpr int64_t kSpan = 256;  // columns of a block

struct Block {
  int64_t tile, row, rows, column, columns;
};

// Calls function(Block) for every block of a matrix [rows, columns], in parallel. The blocks follow from the shape
// alone: tiles of ``tile_rows`` rows by spans of columns, so that few rows of many channels keep several threads busy.
template <typename Function>
void parallel_blocks(int64_t rows, int64_t columns, int64_t tile_rows, Function function) {
  constexpr int64_t least_work = 16384;  // elements that are worth a thread
  const int64_t tiles = ceil_div(rows, tile_rows), spans = ceil_div(columns, kSpan);
  const int64_t grain = ceil_div(least_work, tile_rows * std::clamp<int64_t>(columns, 1, kSpan));
  at::parallel_for(0, tiles * spans, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t tile = task / spans, row = tile * tile_rows, column = task % spans * kSpan;
      function(Block{tile, row, std::min(tile_rows, rows - row), column, std::min(kSpan, columns - column)});
    }
  });
}

// The two sums of a backward over M rows of C columns: per tile of rows, then added in the order of the tiles.
template <typename A>
class TileSums {
 public:
  TileSums(int64_t tiles, int64_t columns) : tiles_(tiles), columns_(columns), sums_(2 * tiles * columns) {}

  A* sum_grad(int64_t tile) const { return sums_.get() + 2 * tile * columns_; }
  A* sum_grad_x(int64_t tile) const { return sum_grad(tile) + columns_; }

  // Writes the sums [C] of all tiles.
  void merge(A* sum_grad_out, A* sum_grad_x_out) const {
    Scratch<double> totals(2 * columns_);
    std::fill_n(totals.get(), 2 * columns_, 0.0);
    for (int64_t tile = 0; tile < tiles_; tile++) {
      const A* sums = sum_grad(tile);
      for (int64_t c = 0; c < 2 * columns_; c++) totals.get()[c] += sums[c];
    }
    for (int64_t c = 0; c < columns_; c++) {
      sum_grad_out[c] = static_cast<A>(totals.get()[c]);
      sum_grad_x_out[c] = static_cast<A>(totals.get()[columns_ + c]);
    }
  }

 private:
  int64_t tiles_, columns_;
  Scratch<A> sums_;
};

}  // namespace densenet_efficient::CPU_CAPABILITY
