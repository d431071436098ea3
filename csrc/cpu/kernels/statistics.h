// Mean and variance of columns, in two stages: per tile of rows, then merged in the order of the tiles (Chan et al.
// 1979). Never E[x^2] - E[x]^2, which loses everything where the mean is large.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Mean and sum of squared deviations of the first ``count`` lanes of some vectors of columns. The second
// pass corrects the first by the mean of the deviations (Chan, Golub and LeVeque 1983).
template <int vectors, typename A, typename T>
ALWAYS_INLINE void column_statistics(const T* tile, int64_t stride, int64_t rows, int64_t count, A* mean, A* m2) {
  constexpr int64_t lanes = kLanes<A>;
  const A inverse = A(1) / static_cast<A>(rows);
  Vector<A> mean_of[vectors]{}, deviations[vectors]{}, squares[vectors]{};
  for (int64_t r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) mean_of[v] += load<A>(tile + r * stride + v * lanes, count);
  }
  for (int v = 0; v < vectors; v++) mean_of[v] *= inverse;
  for (int64_t r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
      const Vector<A> deviation = load<A>(tile + r * stride + v * lanes, count) - mean_of[v];
      deviations[v] += deviation;
      squares[v] += deviation * deviation;
    }
  }
  for (int v = 0; v < vectors; v++) {
    Vector<A> m2_of{};
    add_deviations(mean_of[v], m2_of, deviations[v], squares[v], inverse);
    store(mean + v * lanes, mean_of[v], count);
    store(m2 + v * lanes, m2_of, count);
  }
}

// Mean and sum of squared deviations of each column of ``tile`` [rows, columns].
template <typename A, typename T>
void tile_statistics(const T* tile, int64_t stride, int64_t rows, int64_t columns, A* mean, A* m2) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + 4 * lanes <= columns; c += 4 * lanes) {
    column_statistics<4>(tile + c, stride, rows, lanes, mean + c, m2 + c);
  }
  for (; c < columns; c += lanes) column_statistics<1>(tile + c, stride, rows, columns - c, mean + c, m2 + c);
}

// The statistics of tiles that together make M rows of C columns.
template <typename A>
class TileStatistics {
 public:
  TileStatistics(int64_t tiles, int64_t columns) : columns_(columns), counts_(tiles), moments_(2 * tiles * columns) {}

  // Takes the statistics of the tile of this index, [rows, columns].
  template <typename T>
  void take(int64_t index, const T* tile, int64_t stride, int64_t rows) {
    tile_statistics(tile, stride, rows, columns_, mean(index), mean(index) + columns_);
    counts_[index] = static_cast<double>(rows);
  }

  A* mean(int64_t index) { return moments_.data() + 2 * index * columns_; }
  void set_count(int64_t index, int64_t rows) { counts_[index] = static_cast<double>(rows); }

  // Writes the mean and the biased variance [C].
  void merge(A* mean_out, A* variance_out) {
    std::vector<double> mean_sum(columns_, 0.0), m2_sum(columns_, 0.0);
    double count = 0;
    for (size_t index = 0; index < counts_.size(); index++) {
      const A* tile_mean = mean(index);
      const A* tile_m2 = tile_mean + columns_;
      for (int64_t c = 0; c < columns_; c++) {
        merge_moments<double>(mean_sum[c], m2_sum[c], count, tile_mean[c], tile_m2[c], counts_[index]);
      }
      count += counts_[index];
    }
    for (int64_t c = 0; c < columns_; c++) {
      mean_out[c] = static_cast<A>(mean_sum[c]);
      variance_out[c] = static_cast<A>(m2_sum[c] / std::max(count, 1.0));  // zero, of no rows
    }
  }

 private:
  int64_t columns_;
  std::vector<double> counts_;
  std::vector<A> moments_;  // per tile: means [C], then sums of squared deviations [C]
};

}  // namespace densenet_efficient::CPU_CAPABILITY
