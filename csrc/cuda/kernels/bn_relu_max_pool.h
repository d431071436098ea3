// BN-ReLU-maximum pooling (3x3, stride 2, padding 1): what the host hands to the kernels.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include "cuda/matrix.h"

namespace densenet_efficient::cuda {

// Images whose pixels are the rows of a matrix, and their size when pooled. Fewer than 2^31 pixels in all.
struct PooledImages {
  int images, height, width;
  int out_height, out_width;

  int64_t outputs() const { return int64_t{images} * out_height * out_width; }
};

struct MaxPoolForward {
  c10::ScalarType dtype;  // of the matrices
  PooledImages images;
  int64_t columns;
  Matrix<const void> x;       // [pixels, columns]
  const void *scale, *shift;  // [columns], accumulation type, as all below
  Matrix<void> out;           // [outputs, columns]
};

struct MaxPoolBackward {
  c10::ScalarType dtype;
  PooledImages images;
  int64_t columns;
  Matrix<const void> out_grad;       // [outputs, columns]
  Matrix<const void> x;              // [pixels, columns]
  const void *mean, *scale, *shift;  // [columns]
  Matrix<void> grad;                 // [pixels, columns]
  void *sum_grad, *sum_grad_x;       // [columns]
};

void bn_relu_max_pool(const MaxPoolForward& arguments, cudaStream_t stream);

// The number of elements, of accumulation type, that the kernel needs for partial results.
int64_t partials_of(const MaxPoolBackward& arguments);
void bn_relu_max_pool_backward(const MaxPoolBackward& arguments, void* partials, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
