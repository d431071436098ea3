// BN-ReLU-maximum pooling (3x3, stride 2, padding 1): what the host hands to the kernel. Strides in elements,
// matrices row-major.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

// Outputs along a dimension of ``size`` inputs.
constexpr int64_t max_pooled(int64_t size) { return (size - 1) / 2 + 1; }

struct MaxPoolForward {
  c10::ScalarType dtype;  // of x and out
  const void* x;          // [images * height * width, channels]
  int64_t x_stride;
  int64_t images, height, width, channels;
  int64_t out_height, out_width;
  const void *scale, *shift;  // [channels], accumulation type, as all below
  void* out;                  // [images * out_height * out_width, channels]
  int64_t out_stride;
};

struct MaxPoolBackward {
  c10::ScalarType dtype;  // of the matrices
  const void* out_grad;   // shaped as out above
  int64_t out_grad_stride;
  const void* x;
  int64_t x_stride;
  int64_t images, height, width, channels;
  int64_t out_height, out_width;
  const void *mean, *scale, *shift;  // [channels]
  void* grad;                        // as x
  int64_t grad_stride;
  void *sum_grad, *sum_grad_x;  // [channels]
};

DECLARE_KERNEL(void bn_relu_max_pool(const MaxPoolForward& arguments);)
DECLARE_KERNEL(void bn_relu_max_pool_backward(const MaxPoolBackward& arguments);)

}  // namespace densenet_efficient
