// BN-ReLU-average pooling: what the host hands to the kernel. Strides in elements, matrices row-major.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

struct AvgPoolForward {
  c10::ScalarType dtype;  // of x and out
  const void* x;          // [images * height * width, channels]
  int64_t x_stride;
  int64_t images, height, width, channels;
  int64_t window_height, window_width;
  const void *scale, *shift;  // [channels], accumulation type, as all below
  void* out;                  // [images * (height / window_height) * (width / window_width), channels]
  int64_t out_stride;
};

struct AvgPoolBackward {
  c10::ScalarType dtype;  // of the matrices
  const void* out_grad;   // shaped as out above
  int64_t out_grad_stride;
  const void* x;
  int64_t x_stride;
  int64_t images, height, width, channels;
  int64_t window_height, window_width;
  const void *mean, *scale, *shift;  // [channels]
  void* grad;                        // as x, or null
  int64_t grad_stride;
  bool accumulate;
  void *sum_grad, *sum_grad_x;  // [channels]
};

DECLARE_KERNEL(void bn_relu_avg_pool(const AvgPoolForward& arguments);)
DECLARE_KERNEL(void bn_relu_avg_pool_backward(const AvgPoolBackward& arguments);)

}  // namespace densenet_efficient
