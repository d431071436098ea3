// BN-ReLU-conv3x3 and its backward by the transformation of winograd.h.
#pragma once

#include "cpu/kernels/bn_relu_conv3x3.h"

namespace densenet_efficient {

DECLARE_KERNEL(int64_t transformed_conv3x3_bytes(c10::ScalarType dtype, int64_t channels, int64_t outputs);)
DECLARE_KERNEL(void transform_conv3x3(c10::ScalarType dtype, const void* weight, int64_t channels, int64_t outputs,
                                      void* transformed);)
DECLARE_KERNEL(void bn_relu_conv3x3_winograd(const Conv3x3Forward& arguments);)
DECLARE_KERNEL(void bn_relu_conv3x3_backward_winograd(const Conv3x3Backward& arguments);)

}  // namespace densenet_efficient
