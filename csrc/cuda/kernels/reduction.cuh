// Sums over rows in two stages of fixed order: the threads of a block, then the tiles that the blocks have left.
#pragma once

#include "batch_norm.h"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/tiling.cuh"

namespace densenet_efficient::cuda {

// Mean and sum of squared deviations of some columns, over ``count`` rows.
template <typename A, int kColumns>
struct Moments {
  A values[2 * kColumns + 1];  // means, sums of squares, count

  __device__ A& mean(int j) { return values[j]; }
  __device__ A& m2(int j) { return values[kColumns + j]; }
  __device__ A& count() { return values[2 * kColumns]; }

  __device__ void merge(Moments other) {
    if (other.count() == 0) return;
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      merge_moments(mean(j), m2(j), count(), other.mean(j), other.m2(j), other.count());
    }
    count() += other.count();
  }
};

// The first ``present`` of a few rows enter by their deviations from the mean so far, which at first is the value of
// the first row.
template <typename A, int kColumns, typename Row, int kRows>
__device__ void add_rows(Moments<A, kColumns>& moments, const Row (&rows)[kRows], int present) {
  if (present == 0) return;
  const bool first = moments.count() == 0;
  moments.count() += static_cast<A>(present);
  const A inverse_count = A(1) / moments.count();
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    if (first) moments.mean(j) = rows[0][j];
    A deviations = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      const A deviation = i < present ? rows[i][j] - moments.mean(j) : A(0);
      deviations += deviation;
      squares += deviation * deviation;
    }
    add_deviations(moments.mean(j), moments.m2(j), deviations, squares, inverse_count);
  }
}

// The two sums of a backward over some columns: of the masked gradient g, and of g * (x - mean).
template <typename A, int kColumns>
struct Sums {
  A values[2 * kColumns];

  __device__ A& sum_grad(int j) { return values[j]; }
  __device__ A& sum_grad_x(int j) { return values[kColumns + j]; }

  __device__ void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < 2 * kColumns; i++) values[i] += other.values[i];
  }
};

// Merges the parts of a block's rows of threads into that of the first row, as a binary tree; lanes_y is a power of 2.
// All threads of the block take part.
template <typename A, typename Part>
__device__ void merge_lanes(Part& part, int lane_y, int lanes_x, int lanes_y) {
  constexpr int kValues = sizeof(Part) / sizeof(A);
  __shared__ A scratch[kValues][kThreads / 2];
  for (int step = lanes_y / 2; step > 0; step /= 2) {
    if (step <= lane_y && lane_y < 2 * step) {
      const int slot = static_cast<int>(threadIdx.x) - step * lanes_x;
#pragma unroll
      for (int i = 0; i < kValues; i++) scratch[i][slot] = part.values[i];
    }
    __syncthreads();
    if (lane_y < step) {
      Part other;
#pragma unroll
      for (int i = 0; i < kValues; i++) other.values[i] = scratch[i][threadIdx.x];
      part.merge(other);
    }
    __syncthreads();
  }
}

// Where a tile leaves two values of each of its columns: partials [tiles, 2, columns].
template <typename A>
__device__ A* partial_of(A* partials, int64_t tile, int which, int64_t columns) {
  return partials + (2 * tile + which) * columns;
}

template <typename A, int kColumns>
__device__ void store_part(const A* values, A* partials, const Place& place, int64_t columns) {
#pragma unroll
  for (int j = 0; j < kColumns; j++) {
    if (j >= place.columns) break;
    partial_of(partials, place.tile, 0, columns)[place.column + j] = values[j];
    partial_of(partials, place.tile, 1, columns)[place.column + j] = values[kColumns + j];
  }
}

// ---- second stage: one thread per column and row of threads, in float64

constexpr int kMergeLanesX = 8;
constexpr int kMergeLanesY = kThreads / kMergeLanesX;

template <typename A>
__global__ void __launch_bounds__(kThreads)
    merge_tiles_of_moments(const A* partials, Tiling tiling, A* mean, A* variance) {
  const int lane_y = static_cast<int>(threadIdx.x) / kMergeLanesX;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kMergeLanesX + threadIdx.x % kMergeLanesX;
  Moments<double, 1> moments{};
  for (int64_t tile = lane_y; column < tiling.columns && tile < tiling.tiles; tile += kMergeLanesY) {
    const int64_t left = tiling.rows - tile * tiling.tile_rows;
    Moments<double, 1> part;
    part.mean(0) = partial_of(partials, tile, 0, tiling.columns)[column];
    part.m2(0) = partial_of(partials, tile, 1, tiling.columns)[column];
    part.count() = static_cast<double>(left < tiling.tile_rows ? left : tiling.tile_rows);
    moments.merge(part);
  }
  merge_lanes<double>(moments, lane_y, kMergeLanesX, kMergeLanesY);
  if (lane_y != 0 || column >= tiling.columns) return;
  mean[column] = static_cast<A>(moments.mean(0));
  variance[column] = moments.count() == 0 ? A(0) : static_cast<A>(moments.m2(0) / moments.count());
}

template <typename A>
__global__ void __launch_bounds__(kThreads)
    merge_tiles_of_sums(const A* partials, int64_t tiles, int64_t columns, A* sum_grad, A* sum_grad_x) {
  const int lane_y = static_cast<int>(threadIdx.x) / kMergeLanesX;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kMergeLanesX + threadIdx.x % kMergeLanesX;
  Sums<double, 1> sums{};
  for (int64_t tile = lane_y; column < columns && tile < tiles; tile += kMergeLanesY) {
    sums.sum_grad(0) += partial_of(partials, tile, 0, columns)[column];
    sums.sum_grad_x(0) += partial_of(partials, tile, 1, columns)[column];
  }
  merge_lanes<double>(sums, lane_y, kMergeLanesX, kMergeLanesY);
  if (lane_y != 0 || column >= columns) return;
  sum_grad[column] = static_cast<A>(sums.sum_grad(0));
  sum_grad_x[column] = static_cast<A>(sums.sum_grad_x(0));
}

template <typename A>
void merge_moments_of_tiles(const void* partials, const Tiling& tiling, void* mean, void* variance,
                            cudaStream_t stream) {
  launch(merge_tiles_of_moments<A>, ceil_div(tiling.columns, kMergeLanesX), kThreads, stream,
         static_cast<const A*>(partials), tiling, static_cast<A*>(mean), static_cast<A*>(variance));
}

template <typename A>
void merge_sums_of_tiles(const void* partials, int64_t tiles, int64_t columns, void* sum_grad, void* sum_grad_x,
                         cudaStream_t stream) {
  launch(merge_tiles_of_sums<A>, ceil_div(columns, kMergeLanesX), kThreads, stream, static_cast<const A*>(partials),
         tiles, columns, static_cast<A*>(sum_grad), static_cast<A*>(sum_grad_x));
}

}  // namespace densenet_efficient::cuda
