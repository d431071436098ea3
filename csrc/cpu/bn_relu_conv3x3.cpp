#include "cpu/kernels/bn_relu_conv3x3.h"

#include "checks.h"
#include "operators.h"

namespace densenet_efficient {

using at::Tensor;

void bn_relu_conv3x3(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& weight, int64_t height,
                     int64_t width, const Tensor& out, const std::optional<Tensor>& mean,
                     const std::optional<Tensor>& variance) {
  const int64_t rows = x.size(0), channels = x.size(1), outputs = weight.size(0);
  check_matrix(x, "x", rows, channels, x);
  check_matrix(out, "out", rows, outputs, x);
  check_vector(scale, "scale", channels, x);
  check_vector(shift, "shift", channels, x);
  const Tensor dense_weight = checked_weight(weight, outputs, channels, 3, x);
  Conv3x3Forward arguments{};
  arguments.dtype = x.scalar_type();
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.images = check_images(x, "x", height, width);
  arguments.height = height;
  arguments.width = width;
  arguments.channels = channels;
  arguments.outputs = outputs;
  arguments.scale = scale.const_data_ptr();
  arguments.shift = shift.const_data_ptr();
  arguments.weight = dense_weight.const_data_ptr();
  arguments.channels_last = !dense_weight.is_contiguous();
  arguments.out = out.data_ptr();
  arguments.out_stride = out.stride(0);
  arguments.mean = optional_vector(mean, "mean", outputs, x);
  arguments.variance = optional_vector(variance, "variance", outputs, x);
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_conv3x3)(arguments);
}

void bn_relu_conv3x3_backward(const Tensor& out_grad, const Tensor& x, const Tensor& mean, const Tensor& scale,
                              const Tensor& shift, const Tensor& weight, int64_t height, int64_t width,
                              const std::optional<Tensor>& grad, bool accumulate,
                              const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& sum_grad,
                              const std::optional<Tensor>& sum_grad_x) {
  const int64_t rows = x.size(0), channels = x.size(1), outputs = weight.size(0);
  check_matrix(x, "x", rows, channels, x);
  check_matrix(out_grad, "out_grad", rows, outputs, x);
  check_vector(mean, "mean", channels, x);
  check_vector(scale, "scale", channels, x);
  check_vector(shift, "shift", channels, x);
  if (grad) check_matrix(*grad, "grad", rows, channels, x);
  TORCH_CHECK(sum_grad.has_value() == sum_grad_x.has_value(), "sum_grad and sum_grad_x must be given together");
  TORCH_CHECK(sum_grad || !grad, "grad needs sum_grad and sum_grad_x");
  const Tensor dense_weight = checked_weight(weight, outputs, channels, 3, x);
  Conv3x3Backward arguments{};
  arguments.dtype = x.scalar_type();
  arguments.out_grad = out_grad.const_data_ptr();
  arguments.out_grad_stride = out_grad.stride(0);
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.images = check_images(x, "x", height, width);
  arguments.height = height;
  arguments.width = width;
  arguments.channels = channels;
  arguments.outputs = outputs;
  arguments.mean = mean.const_data_ptr();
  arguments.scale = scale.const_data_ptr();
  arguments.shift = shift.const_data_ptr();
  arguments.weight = dense_weight.const_data_ptr();
  arguments.channels_last = !dense_weight.is_contiguous();
  arguments.grad = grad ? grad->data_ptr() : nullptr;
  arguments.grad_stride = grad ? grad->stride(0) : 0;
  arguments.accumulate = accumulate;
  arguments.grad_weight = optional_grad_weight(grad_weight, weight, x);
  arguments.grad_channels_last = grad_weight && !grad_weight->is_contiguous();
  arguments.sum_grad = optional_vector(sum_grad, "sum_grad", channels, x);
  arguments.sum_grad_x = optional_vector(sum_grad_x, "sum_grad_x", channels, x);
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_conv3x3_backward)(arguments);
}

}  // namespace densenet_efficient
