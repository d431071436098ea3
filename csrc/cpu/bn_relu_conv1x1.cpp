#include "cpu/kernels/bn_relu_conv1x1.h"

#include "checks.h"
#include "operators.h"

namespace densenet_efficient {

using at::Tensor;

void bn_relu_conv1x1(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight, const Tensor& out,
                     const std::optional<Tensor>& mean, const std::optional<Tensor>& variance) {
  const int64_t rows = x.size(0), channels = x.size(1), outputs = weight.size(0);
  check_matrix(x, "x", rows, channels, x);
  check_matrix(out, "out", rows, outputs, x);
  check_vector(scale, "scale", channels, x);
  check_vector(shift, "shift", channels, x);
  const Tensor dense_weight = checked_weight(weight, outputs, channels, 1, x);
  Conv1x1Forward arguments{};
  arguments.dtype = x.scalar_type();
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.rows = rows;
  arguments.channels = channels;
  arguments.outputs = outputs;
  arguments.scale = scale.const_data_ptr();
  arguments.shift = shift.const_data_ptr();
  arguments.weight = dense_weight.const_data_ptr();
  arguments.out = out.data_ptr();
  arguments.out_stride = out.stride(0);
  arguments.mean = optional_vector(mean, "mean", outputs, x);
  arguments.variance = optional_vector(variance, "variance", outputs, x);
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_conv1x1)(arguments);
}

void bn_relu_conv1x1_backward(const Tensor& out_grad, const Tensor& out, const Tensor& out_mean,
                              const Tensor& out_slope, const Tensor& out_offset, const Tensor& x, const Tensor& mean,
                              const Tensor& scale, const Tensor& shift, const Tensor& weight,
                              const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_weight,
                              const std::optional<Tensor>& sum_grad, const std::optional<Tensor>& sum_grad_x) {
  const int64_t rows = x.size(0), channels = x.size(1), outputs = weight.size(0);
  check_matrix(x, "x", rows, channels, x);
  check_matrix(out_grad, "out_grad", rows, outputs, x);
  check_matrix(out, "out", rows, outputs, x);
  check_vector(out_mean, "out_mean", outputs, x);
  check_vector(out_slope, "out_slope", outputs, x);
  check_vector(out_offset, "out_offset", outputs, x);
  check_vector(mean, "mean", channels, x);
  check_vector(scale, "scale", channels, x);
  check_vector(shift, "shift", channels, x);
  if (grad) check_matrix(*grad, "grad", rows, channels, x);
  TORCH_CHECK(sum_grad.has_value() == sum_grad_x.has_value(), "sum_grad and sum_grad_x must be given together");
  TORCH_CHECK(sum_grad || !grad, "grad needs sum_grad and sum_grad_x");
  const Tensor dense_weight = checked_weight(weight, outputs, channels, 1, x);
  Conv1x1Backward arguments{};
  arguments.dtype = x.scalar_type();
  arguments.out_grad = out_grad.const_data_ptr();
  arguments.out = out.const_data_ptr();
  arguments.out_grad_stride = out_grad.stride(0);
  arguments.out_stride = out.stride(0);
  arguments.out_mean = out_mean.const_data_ptr();
  arguments.out_slope = out_slope.const_data_ptr();
  arguments.out_offset = out_offset.const_data_ptr();
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.rows = rows;
  arguments.channels = channels;
  arguments.outputs = outputs;
  arguments.mean = mean.const_data_ptr();
  arguments.scale = scale.const_data_ptr();
  arguments.shift = shift.const_data_ptr();
  arguments.weight = dense_weight.const_data_ptr();
  arguments.grad = grad ? grad->data_ptr() : nullptr;
  arguments.grad_stride = grad ? grad->stride(0) : 0;
  arguments.grad_weight = optional_grad_weight(grad_weight, weight, x);
  arguments.sum_grad = optional_vector(sum_grad, "sum_grad", channels, x);
  arguments.sum_grad_x = optional_vector(sum_grad_x, "sum_grad_x", channels, x);
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_conv1x1_backward)(arguments);
}

}  // namespace densenet_efficient
