// Images written as rows of a slot, with the statistics of their channels: what the host hands to the kernel. Strides
// in elements.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

struct WriteWithStatistics {
  c10::ScalarType dtype;  // of x and out
  const void* x;          // [images, channels, pixels]
  int64_t image_stride, channel_stride, pixel_stride;
  int64_t images, channels, pixels;
  void* out;  // [images * pixels, channels], row-major
  int64_t out_stride;
  void *mean, *variance;  // [channels], accumulation type
};

DECLARE_KERNEL(void write_with_statistics(const WriteWithStatistics& arguments);)

}  // namespace densenet_efficient
