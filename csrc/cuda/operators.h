// The operators of a GPU that bandwidth bounds. Each checks its arguments; what it computes stands in
// densenet_efficient/kernels/reference.py.
#pragma once

#include <ATen/core/ATen_fwd.h>

#include <optional>

namespace densenet_efficient::cuda {

void batch_norm_affine(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& weight,
                       const at::Tensor& bias, double eps, const at::Tensor& affine);

void batch_norm_gradients(const at::Tensor& sum_grad, const at::Tensor& sum_grad_x, const at::Tensor& rstd,
                          const at::Tensor& scale, int64_t count, const std::optional<at::Tensor>& grad_weight,
                          const std::optional<at::Tensor>& slope, const std::optional<at::Tensor>& offset);

void channel_stats(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& variance);

void write_with_statistics(const at::Tensor& x, const at::Tensor& out, const at::Tensor& mean,
                           const at::Tensor& variance);

void project_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& slope,
                      const at::Tensor& offset);

void bn_relu_avg_pool(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, int64_t height,
                      int64_t width, int64_t window_height, int64_t window_width, const at::Tensor& out);

void bn_relu_avg_pool_backward(const at::Tensor& out_grad, const at::Tensor& x, const at::Tensor& mean,
                               const at::Tensor& scale, const at::Tensor& shift, int64_t height, int64_t width,
                               int64_t window_height, int64_t window_width, const std::optional<at::Tensor>& grad,
                               bool accumulate, const at::Tensor& sum_grad, const at::Tensor& sum_grad_x);

void bn_relu_max_pool(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift, int64_t height,
                      int64_t width, const at::Tensor& out);

void bn_relu_max_pool_backward(const at::Tensor& out_grad, const at::Tensor& x, const at::Tensor& mean,
                               const at::Tensor& scale, const at::Tensor& shift, int64_t height, int64_t width,
                               const at::Tensor& grad, const at::Tensor& sum_grad, const at::Tensor& sum_grad_x);

}  // namespace densenet_efficient::cuda
