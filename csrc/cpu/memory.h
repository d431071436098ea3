// Uninitialised tensors whose memory is kept when they are freed: the next step takes it again, with its pages.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <c10/core/Allocator.h>

namespace densenet_efficient {

at::Tensor empty_kept(at::IntArrayRef size, const at::TensorOptions& options);
at::Tensor empty_kept_strided(at::IntArrayRef size, at::IntArrayRef stride, const at::TensorOptions& options);

// Aligned to a cache line, and not counted by torch's profiler.
c10::DataPtr allocate_kept(size_t bytes);

}  // namespace densenet_efficient
