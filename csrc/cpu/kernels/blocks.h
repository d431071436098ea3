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

// The two sums of a backward over M rows of C columns: per part of the rows, then added in the order of the parts.
template <typename A>
class PartialSums {
 public:
  PartialSums(int64_t parts, int64_t columns) : parts_(parts), columns_(columns), sums_(2 * parts * columns) {}

  A* sum_grad(int64_t part) const { return sums_.get() + 2 * part * columns_; }
  A* sum_grad_x(int64_t part) const { return sum_grad(part) + columns_; }

  // Some columns of a part begin at zero.
  void clear(int64_t part, int64_t column, int64_t columns) const {
    std::fill_n(sum_grad(part) + column, columns, A(0));
    std::fill_n(sum_grad_x(part) + column, columns, A(0));
  }

  // Writes the sums of all parts for some columns; the results begin with column 0.
  void merge(int64_t column, int64_t columns, void* sum_grad_out, void* sum_grad_x_out) const {
    const Scratch<double> totals(2 * columns);
    double *total = totals.get(), *total_x = total + columns;
    std::fill_n(total, 2 * columns, 0.0);
    for (int64_t part = 0; part < parts_; part++) {
      const A *sums = sum_grad(part) + column, *sums_x = sum_grad_x(part) + column;
      for (int64_t c = 0; c < columns; c++) total[c] += sums[c];
      for (int64_t c = 0; c < columns; c++) total_x[c] += sums_x[c];
    }
    std::copy_n(total, columns, static_cast<A*>(sum_grad_out) + column);
    std::copy_n(total_x, columns, static_cast<A*>(sum_grad_x_out) + column);
  }

 private:
  int64_t parts_, columns_;
  Scratch<A> sums_;
};

}  // namespace densenet_efficient::CPU_CAPABILITY
