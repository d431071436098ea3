// What every backward of a BN-ReLU does with the gradient of its activations.
#pragma once

#include "batch_norm.h"
#include "cuda/kernels/reduction.cuh"

namespace densenet_efficient::cuda {

// Masks gradients by the ReLU, takes their sums, and gives scale times them.
template <typename S>
struct Deposit {
  using A = Accumulate<S>;

  CoefficientsOf<S> mean, scale, shift;
  Sums<A, kWidth<S>> sums;

  __device__ Deposit(const void* mean_of, const void* scale_of, const void* shift_of, const Place& place)
      : mean(mean_of, place), scale(scale_of, place), shift(shift_of, place), sums{} {}

  // For column j of a row: the value of x, and the gradient of its activation.
  __device__ A take(int j, A x, A gradient) {
    const A masked = relu_mask(affine(x, scale[j], shift[j]), gradient, kZero<S>);
    sums.sum_grad(j) += masked;
    sums.sum_grad_x(j) += masked * (x - mean[j]);
    return masked * scale[j];
  }

  // The block's sums into the partials of its tile.
  __device__ void finish(A* partials, const Place& place, const Tiling& tiling) {
    merge_lanes<A>(sums, place.lane_y, tiling.lanes_x, tiling.lanes_y);
    if (place.lane_y == 0) store_part<A, kWidth<S>>(sums.values, partials, place, tiling.columns);
  }
};

}  // namespace densenet_efficient::cuda
