// BN-ReLU-average pooling: what the host hands to the kernels.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include "cuda/matrix.h"

namespace densenet_efficient::cuda {

// Images whose pixels are the rows of a matrix, and the windows side by side that they are pooled over; a rest is left
// out. Fewer than 2^32 pixels in all.
struct Windows {
  uint32_t images, height, width;
  uint32_t window_height, window_width;
  uint32_t out_height, out_width;

  int64_t pixels() const { return int64_t{images} * height * width; }
  int64_t outputs() const { return int64_t{images} * out_height * out_width; }
};

struct AvgPoolForward {
  c10::ScalarType dtype;  // of the matrices
  Windows windows;
  int64_t columns;
  Matrix<const void> x;       // [pixels, columns]
  const void *scale, *shift;  // [columns], accumulation type, as all below
  Matrix<void> out;           // [outputs, columns]
};

struct AvgPoolBackward {
  c10::ScalarType dtype;
  Windows windows;
  int64_t columns;
  Matrix<const void> out_grad;       // [outputs, columns]
  Matrix<const void> x;              // [pixels, columns]
  const void *mean, *scale, *shift;  // [columns]
  Matrix<void> grad;                 // [pixels, columns], or null
  bool accumulate;
  void *sum_grad, *sum_grad_x;  // [columns]
};

void bn_relu_avg_pool(const AvgPoolForward& arguments, cudaStream_t stream);

// The number of elements, of accumulation type, that the kernel needs for partial results.
int64_t partials_of(const AvgPoolBackward& arguments);
void bn_relu_avg_pool_backward(const AvgPoolBackward& arguments, void* partials, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
