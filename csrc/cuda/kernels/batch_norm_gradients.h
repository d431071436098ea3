// The gradients of a batch norm and its share of the projection: what the host hands to the kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace densenet_efficient::cuda {

struct BatchNormGradients {
  c10::ScalarType dtype;  // of all vectors
  int64_t columns;
  const void *sum_grad, *sum_grad_x, *rstd, *scale;  // [columns]
  int64_t count;                                     // rows that were summed
  void* grad_weight;                                 // [columns], or null
  void *slope, *offset;                              // [columns], added to; or both null
};

void batch_norm_gradients(const BatchNormGradients& arguments, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
