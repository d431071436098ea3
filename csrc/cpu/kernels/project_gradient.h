// The batch norm's projection: what the host hands to the kernel. Strides in elements, matrices row-major.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

struct ProjectGradient {
  c10::ScalarType dtype;  // of the matrices
  void* grad;             // [rows, channels], as x
  int64_t grad_stride;
  const void* x;
  int64_t x_stride;
  int64_t rows, channels;
  const void *mean, *slope, *offset;  // [channels], accumulation type
};

DECLARE_KERNEL(void project_gradient(const ProjectGradient& arguments);)

}  // namespace densenet_efficient
