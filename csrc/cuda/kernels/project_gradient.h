// The batch norm's projection of a gradient: what the host hands to the kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include "cuda/matrix.h"

namespace densenet_efficient::cuda {

struct ProjectGradient {
  c10::ScalarType dtype;  // of the matrices
  Matrix<void> grad;      // [rows, columns], in place
  Matrix<const void> x;   // [rows, columns]
  int64_t rows, columns;
  const void *mean, *slope, *offset;  // [columns], accumulation type
};

void project_gradient(const ProjectGradient& arguments, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
