// Images written as rows of a slot, with the statistics of their channels: what the host hands to the kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include "cuda/matrix.h"

namespace densenet_efficient::cuda {

// Strides in elements. Rows are counted in 32 bits: rows = images * pixels.
struct FlatImages {
  const void* data;  // [images, channels, pixels]
  int64_t image_stride, channel_stride, pixel_stride;
  uint32_t pixels;

  bool has_channels_side_by_side() const { return channel_stride == 1; }
};

struct WriteWithStatistics {
  c10::ScalarType dtype;  // of x and out
  FlatImages x;
  Matrix<void> out;  // [rows, columns]
  int64_t rows, columns;
  void *mean, *variance;  // [columns], accumulation type
};

// The number of elements, of accumulation type, that the kernel needs for partial results.
int64_t partials_of(const WriteWithStatistics& arguments);
void write_with_statistics(const WriteWithStatistics& arguments, void* partials, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
