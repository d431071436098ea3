// The affine map of a batch norm: what the host hands to the kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace densenet_efficient::cuda {

// A contiguous vector of any floating dtype.
struct AnyVector {
  const void* data;
  c10::ScalarType dtype;
};

struct BatchNormAffine {
  c10::ScalarType dtype;  // of affine
  int64_t columns;
  AnyVector mean, variance, weight, bias;  // [columns]
  double eps;
  void* affine;  // [4, columns]: mean, rstd, scale, shift
};

void batch_norm_affine(const BatchNormAffine& arguments, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
