// Statistics of channels: what the host hands to the kernel. Strides in elements, matrices row-major.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

#include "cpu/capability.h"

namespace densenet_efficient {

struct ChannelStats {
  c10::ScalarType dtype;  // of x
  const void* x;          // [rows, channels]
  int64_t x_stride;
  int64_t rows, channels;
  void *mean, *variance;  // [channels], accumulation type
};

DECLARE_KERNEL(void channel_stats(const ChannelStats& arguments);)

}  // namespace densenet_efficient
