// Parts of tensors, made without the dispatcher: the native loops over layers take thousands of them in a step, each of
// which would take a microsecond.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <cstdint>

namespace densenet_efficient {

// As Tensor::narrow.
inline at::Tensor narrow(const at::Tensor& tensor, int64_t dim, int64_t start, int64_t length) {
  TORCH_CHECK(start >= 0 && length >= 0 && start + length <= tensor.size(dim), "expected at least ", start + length,
              " elements along axis ", dim, ", got ", tensor.size(dim));
  c10::SmallVector<int64_t, 4> sizes(tensor.sizes());
  sizes[dim] = length;
  return at::cpu::as_strided(tensor, sizes, tensor.strides(), tensor.storage_offset() + start * tensor.stride(dim));
}

// As Tensor::select along the first axis.
inline at::Tensor select(const at::Tensor& tensor, int64_t index) {
  TORCH_CHECK(index >= 0 && index < tensor.size(0), "expected more than ", index,
              " elements along the first axis, got ", tensor.size(0));
  return at::cpu::as_strided(tensor, tensor.sizes().slice(1), tensor.strides().slice(1),
                             tensor.storage_offset() + index * tensor.stride(0));
}

}  // namespace densenet_efficient
