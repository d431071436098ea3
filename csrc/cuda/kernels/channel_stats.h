// Mean and variance of columns: what the host hands to the kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include "cuda/matrix.h"

namespace densenet_efficient::cuda {

struct ChannelStats {
  c10::ScalarType dtype;  // of x
  Matrix<const void> x;   // [rows, columns]
  int64_t rows, columns;
  void *mean, *variance;  // [columns], accumulation type
};

// The number of elements, of accumulation type, that the kernel needs for partial results.
int64_t partials_of(const ChannelStats& arguments);
void channel_stats(const ChannelStats& arguments, void* partials, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
