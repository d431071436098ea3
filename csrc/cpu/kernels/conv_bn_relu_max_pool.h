// Convolution-BN-ReLU-maximum pooling (3x3, stride 2, padding 1), the stem at inference: what the host hands to the
// kernel. Strides in elements.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

struct ConvMaxPoolForward {
  c10::ScalarType dtype;    // of x, weight and out
  const void* x;            // [images, channels, height, width]
  const int64_t* x_stride;  // of each dimension, as below
  int64_t images, channels, height, width;
  const void* weight;  // [outputs, channels, kernel height, kernel width]
  const int64_t* weight_stride;
  int64_t outputs;
  int64_t kernel[2], stride[2], padding[2];  // of the convolution, height first
  int64_t conv_height, conv_width, out_height, out_width;
  const void *scale, *shift;  // [outputs], accumulation type
  void* out;                  // [images * out_height * out_width, outputs]
  int64_t out_stride;
};

DECLARE_KERNEL(void conv_bn_relu_max_pool(const ConvMaxPoolForward& arguments);)

}  // namespace densenet_efficient
