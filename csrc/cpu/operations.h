// The operators that a loop over the layers of a dense block runs. Each checks its arguments; what it computes stands
// in densenet_efficient/kernels/reference.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace densenet_efficient {

void batch_norm_affine(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& weight,
                       const at::Tensor& bias, double eps, const at::Tensor& affine);

void batch_norm_gradients(const at::Tensor& sum_grad, const at::Tensor& sum_grad_x, const at::Tensor& rstd,
                          const at::Tensor& scale, int64_t count, const std::optional<at::Tensor>& grad_weight,
                          const std::optional<at::Tensor>& slope, const std::optional<at::Tensor>& offset);

void bn_relu_conv1x1(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, const at::Tensor& weight,
                     const at::Tensor& out, const std::optional<at::Tensor>& mean,
                     const std::optional<at::Tensor>& variance);

void bn_relu_conv1x1_backward(const at::Tensor& out_grad, const at::Tensor& out, const at::Tensor& out_mean,
                              const at::Tensor& out_slope, const at::Tensor& out_offset, const at::Tensor& x,
                              const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& shift,
                              const at::Tensor& weight, const std::optional<at::Tensor>& grad,
                              const std::optional<at::Tensor>& grad_weight, const std::optional<at::Tensor>& sum_grad,
                              const std::optional<at::Tensor>& sum_grad_x);

void bn_relu_conv3x3(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, const at::Tensor& weight,
                     int64_t height, int64_t width, const at::Tensor& out, const std::optional<at::Tensor>& mean,
                     const std::optional<at::Tensor>& variance);

void bn_relu_conv3x3_backward(const at::Tensor& out_grad, const at::Tensor& x, const at::Tensor& mean,
                              const at::Tensor& scale, const at::Tensor& shift, const at::Tensor& weight,
                              int64_t height, int64_t width, const std::optional<at::Tensor>& grad, bool accumulate,
                              const std::optional<at::Tensor>& grad_weight, const std::optional<at::Tensor>& sum_grad,
                              const std::optional<at::Tensor>& sum_grad_x);

void project_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& slope,
                      const at::Tensor& offset);

}  // namespace densenet_efficient
