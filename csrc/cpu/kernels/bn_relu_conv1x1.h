// BN-ReLU-conv1x1: what the host hands to the kernel. Strides in elements, matrices row-major.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

struct Conv1x1Forward {
  c10::ScalarType dtype;  // of x and out
  const void* x;          // [rows, channels]
  int64_t x_stride;
  int64_t rows, channels, outputs;
  const void *scale, *shift;  // [channels], accumulation type, as all below
  const void* weight;         // [outputs, channels], contiguous; not read where it is given packed
  const void* packed;         // what pack_conv1x1 has written, or null
  void* out;                  // [rows, outputs]
  int64_t out_stride;
  void *mean, *variance;  // [outputs], or null
  const void* next;       // memory that the operation behind this one reads, or null
  int64_t next_bytes;
};

struct Conv1x1Backward {
  c10::ScalarType dtype;  // of the matrices
  const void *out_grad, *out;
  int64_t out_grad_stride, out_stride;
  const void *out_mean, *out_slope, *out_offset;  // [outputs]
  const void* x;                                  // [rows, channels]
  int64_t x_stride;
  int64_t rows, channels, outputs;
  const void *mean, *scale, *shift;  // [channels]
  const void* weight;                // [outputs, channels], contiguous
  void* grad;                        // [rows, channels], or null
  int64_t grad_stride;
  void* grad_weight;            // [outputs, channels], contiguous, or null
  void *sum_grad, *sum_grad_x;  // [channels], or null where no gradient of x is needed
};

// The weight as a forward's products take it, packed once for many calls.
DECLARE_KERNEL(int64_t conv1x1_packed_bytes(c10::ScalarType dtype, int64_t channels, int64_t outputs);)
DECLARE_KERNEL(void pack_conv1x1(c10::ScalarType dtype, const void* weight, int64_t channels, int64_t outputs,
                                 void* packed);)
DECLARE_KERNEL(void bn_relu_conv1x1(const Conv1x1Forward& arguments);)
DECLARE_KERNEL(void bn_relu_conv1x1_backward(const Conv1x1Backward& arguments);)

}  // namespace densenet_efficient
