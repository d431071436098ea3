// The operators, on a CPU and, those that bandwidth bounds, on a GPU. Each checks its arguments; what it computes
// stands in densenet_efficient/kernels/reference.py.
#pragma once

#include <ATen/core/ATen_fwd.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <vector>

namespace densenet_efficient {

void batch_norm_affine(const at::Tensor& mean, const at::Tensor& variance, const at::Tensor& weight,
                       const at::Tensor& bias, double eps, const at::Tensor& affine);

void batch_norm_gradients(const at::Tensor& sum_grad, const at::Tensor& sum_grad_x, const at::Tensor& rstd,
                          const at::Tensor& scale, int64_t count, const std::optional<at::Tensor>& grad_weight,
                          const std::optional<at::Tensor>& slope, const std::optional<at::Tensor>& offset);

void channel_stats(const at::Tensor& x, const at::Tensor& mean, const at::Tensor& variance);

void write_with_statistics(const at::Tensor& x, const at::Tensor& out, const at::Tensor& mean,
                           const at::Tensor& variance);

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

void conv_bn_relu_max_pool(const at::Tensor& x, const at::Tensor& weight, at::IntArrayRef stride,
                           at::IntArrayRef padding, const at::Tensor& scale, const at::Tensor& shift,
                           const at::Tensor& out);

at::Tensor packed_weight(const at::Tensor& weight, at::ScalarType dtype);

void dense_stage_inference(const at::Tensor& x, int64_t height, int64_t width, int64_t bottleneck_channels,
                           int64_t growth_rate, const c10::List<at::Tensor>& affines,
                           const c10::List<at::Tensor>& packed, const std::optional<at::Tensor>& exit_affine,
                           const std::optional<at::Tensor>& exit_packed, at::IntArrayRef window,
                           const std::optional<at::Tensor>& features, const std::optional<at::Tensor>& out);

std::vector<at::Tensor> dense_layers(const at::Tensor& storage, int64_t height, int64_t width,
                                     const at::Tensor& statistics, bool with_statistics,
                                     const at::Tensor& bottleneck_statistics, at::TensorList weights,
                                     at::TensorList biases, at::ArrayRef<double> epsilons,
                                     const c10::List<std::optional<at::Tensor>>& running, at::TensorList convolutions,
                                     int64_t saved_bottlenecks);

std::vector<std::optional<at::Tensor>> dense_layers_backward(
    const at::Tensor& grad, const at::Tensor& storage, int64_t height, int64_t width, const at::Tensor& statistics,
    const at::Tensor& bottleneck_statistics, at::TensorList bottlenecks, at::TensorList weights, at::TensorList biases,
    at::ArrayRef<double> epsilons, const c10::List<std::optional<at::Tensor>>& running, at::TensorList convolutions,
    const at::Tensor& slope, const at::Tensor& offset, bool nothing_to_project, const c10::List<bool>& needed,
    bool input_needed);

at::Tensor empty_kept_like(const at::Tensor& like, at::IntArrayRef size, bool channels_last);

void return_freed_memory();

double cpu_product_rate(at::ScalarType dtype, double seconds);

// Of the same arguments on a GPU.
namespace cuda {

decltype(densenet_efficient::batch_norm_affine) batch_norm_affine;
decltype(densenet_efficient::batch_norm_gradients) batch_norm_gradients;
decltype(densenet_efficient::channel_stats) channel_stats;
decltype(densenet_efficient::write_with_statistics) write_with_statistics;
decltype(densenet_efficient::project_gradient) project_gradient;
decltype(densenet_efficient::bn_relu_avg_pool) bn_relu_avg_pool;
decltype(densenet_efficient::bn_relu_avg_pool_backward) bn_relu_avg_pool_backward;
decltype(densenet_efficient::bn_relu_max_pool) bn_relu_max_pool;
decltype(densenet_efficient::bn_relu_max_pool_backward) bn_relu_max_pool_backward;

}  // namespace cuda

}  // namespace densenet_efficient
