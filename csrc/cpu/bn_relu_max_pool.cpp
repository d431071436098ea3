#include "cpu/kernels/bn_relu_max_pool.h"

#include "checks.h"
#include "operators.h"

namespace densenet_efficient {

using at::Tensor;

void bn_relu_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t height, int64_t width,
                      const Tensor& out) {
  const int64_t channels = x.size(1), images = check_images(x, "x", height, width);
  check_matrix(x, "x", x.size(0), channels, x);
  check_matrix(out, "out", images * max_pooled(height) * max_pooled(width), channels, x);
  check_vector(scale, "scale", channels, x);
  check_vector(shift, "shift", channels, x);
  MaxPoolForward arguments{};
  arguments.dtype = x.scalar_type();
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.images = images;
  arguments.height = height;
  arguments.width = width;
  arguments.channels = channels;
  arguments.out_height = max_pooled(height);
  arguments.out_width = max_pooled(width);
  arguments.scale = scale.const_data_ptr();
  arguments.shift = shift.const_data_ptr();
  arguments.out = out.data_ptr();
  arguments.out_stride = out.stride(0);
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_max_pool)(arguments);
}

void bn_relu_max_pool_backward(const Tensor& out_grad, const Tensor& x, const Tensor& mean, const Tensor& scale,
                               const Tensor& shift, int64_t height, int64_t width, const Tensor& grad,
                               const Tensor& sum_grad, const Tensor& sum_grad_x) {
  const int64_t rows = x.size(0), channels = x.size(1), images = check_images(x, "x", height, width);
  check_matrix(x, "x", rows, channels, x);
  check_matrix(out_grad, "out_grad", images * max_pooled(height) * max_pooled(width), channels, x);
  check_matrix(grad, "grad", rows, channels, x);
  check_vector(mean, "mean", channels, x);
  check_vector(scale, "scale", channels, x);
  check_vector(shift, "shift", channels, x);
  check_vector(sum_grad, "sum_grad", channels, x);
  check_vector(sum_grad_x, "sum_grad_x", channels, x);
  MaxPoolBackward arguments{};
  arguments.dtype = x.scalar_type();
  arguments.out_grad = out_grad.const_data_ptr();
  arguments.out_grad_stride = out_grad.stride(0);
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.images = images;
  arguments.height = height;
  arguments.width = width;
  arguments.channels = channels;
  arguments.out_height = max_pooled(height);
  arguments.out_width = max_pooled(width);
  arguments.mean = mean.const_data_ptr();
  arguments.scale = scale.const_data_ptr();
  arguments.shift = shift.const_data_ptr();
  arguments.grad = grad.data_ptr();
  arguments.grad_stride = grad.stride(0);
  arguments.sum_grad = sum_grad.data_ptr();
  arguments.sum_grad_x = sum_grad_x.data_ptr();
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_max_pool_backward)(arguments);
}

}  // namespace densenet_efficient
