// BN-ReLU-conv3x3: what the host hands to the kernel. Strides in elements, matrices row-major.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

struct Conv3x3Forward {
  c10::ScalarType dtype;  // of x and out
  const void* x;          // [images * height * width, channels]
  int64_t x_stride;
  int64_t images, height, width, channels, outputs;
  const void *scale, *shift;  // [channels], accumulation type, as all below
  const void* weight;         // [outputs, channels, 3, 3]; not read where it is given packed
  bool channels_last;         // of the weight, which is contiguous otherwise
  const void* packed;         // what pack_conv3x3 has written, or null
  void* out;                  // [images * height * width, outputs]
  int64_t out_stride;
  void *mean, *variance;  // [outputs], or null
  const void* next;       // memory that the operation behind this one reads, or null
  int64_t next_bytes;
};

struct Conv3x3Backward {
  c10::ScalarType dtype;  // of the matrices
  const void* out_grad;   // [images * height * width, outputs]
  int64_t out_grad_stride;
  const void* x;  // [images * height * width, channels]
  int64_t x_stride;
  int64_t images, height, width, channels, outputs;
  const void *mean, *scale, *shift;  // [channels]
  const void* weight;                // [outputs, channels, 3, 3]
  bool channels_last;                // of the weight, which is contiguous otherwise
  void* grad;                        // as x, or null
  int64_t grad_stride;
  bool accumulate;
  void* grad_weight;  // as weight, or null
  bool grad_channels_last;
  void *sum_grad, *sum_grad_x;  // [channels], or null where no gradient of x is needed
};

// The weight as a forward's products take it, packed once for many calls.
DECLARE_KERNEL(int64_t conv3x3_packed_bytes(c10::ScalarType dtype, int64_t channels, int64_t outputs);)
DECLARE_KERNEL(void pack_conv3x3(c10::ScalarType dtype, const void* weight, int64_t channels, int64_t outputs,
                                 void* packed);)
DECLARE_KERNEL(void bn_relu_conv3x3(const Conv3x3Forward& arguments);)
DECLARE_KERNEL(void bn_relu_conv3x3_backward(const Conv3x3Backward& arguments);)

}  // namespace densenet_efficient
