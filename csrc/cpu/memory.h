// Uninitialised tensors whose memory is kept when they are freed: the next step takes it again, with its pages.
#pragma once

#include <ATen/core/Tensor.h>

namespace densenet_efficient {

at::Tensor empty_kept(at::IntArrayRef size, const at::TensorOptions& options);

}  // namespace densenet_efficient
