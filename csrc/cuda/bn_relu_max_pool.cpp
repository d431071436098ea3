#include "cuda/kernels/bn_relu_max_pool.h"

#include "cuda/host.h"
#include "operators.h"

namespace densenet_efficient::cuda {
namespace {

using at::Tensor;

// Outputs along a dimension of ``size`` inputs.
int pooled(int64_t size) { return static_cast<int>((size - 1) / 2 + 1); }

// The images whose pixels are the rows of x.
PooledImages images_of(const Tensor& x, int64_t height, int64_t width) {
  const int64_t images = check_images(x, "x", height, width);
  check_pixels(x);
  return {
      .images = static_cast<int>(images),
      .height = static_cast<int>(height),
      .width = static_cast<int>(width),
      .out_height = pooled(height),
      .out_width = pooled(width),
  };
}

}  // namespace

void bn_relu_max_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t height, int64_t width,
                      const Tensor& out) {
  check_storage_dtype(x);
  const int64_t columns = x.size(1);
  const PooledImages images = images_of(x, height, width);
  check_matrix(x, "x", x.size(0), columns, x);
  check_matrix(out, "out", images.outputs(), columns, x);
  check_vector(scale, "scale", columns, x);
  check_vector(shift, "shift", columns, x);
  const MaxPoolForward arguments{
      .dtype = x.scalar_type(),
      .images = images,
      .columns = columns,
      .x = matrix_of(x),
      .scale = scale.const_data_ptr(),
      .shift = shift.const_data_ptr(),
      .out = mutable_matrix_of(out),
  };
  launch_for(x, [&](cudaStream_t stream) { bn_relu_max_pool(arguments, stream); });
}

void bn_relu_max_pool_backward(const Tensor& out_grad, const Tensor& x, const Tensor& mean, const Tensor& scale,
                               const Tensor& shift, int64_t height, int64_t width, const Tensor& grad,
                               const Tensor& sum_grad, const Tensor& sum_grad_x) {
  check_storage_dtype(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  const PooledImages images = images_of(x, height, width);
  check_matrix(x, "x", rows, columns, x);
  check_matrix(out_grad, "out_grad", images.outputs(), columns, x);
  check_matrix(grad, "grad", rows, columns, x);
  check_vector(mean, "mean", columns, x);
  check_vector(scale, "scale", columns, x);
  check_vector(shift, "shift", columns, x);
  check_vector(sum_grad, "sum_grad", columns, x);
  check_vector(sum_grad_x, "sum_grad_x", columns, x);
  const MaxPoolBackward arguments{
      .dtype = x.scalar_type(),
      .images = images,
      .columns = columns,
      .out_grad = matrix_of(out_grad),
      .x = matrix_of(x),
      .mean = mean.const_data_ptr(),
      .scale = scale.const_data_ptr(),
      .shift = shift.const_data_ptr(),
      .grad = mutable_matrix_of(grad),
      .sum_grad = sum_grad.data_ptr(),
      .sum_grad_x = sum_grad_x.data_ptr(),
  };
  launch_with_partials(x, partials_of(arguments), [&](void* partials, cudaStream_t stream) {
    bn_relu_max_pool_backward(arguments, partials, stream);
  });
}

}  // namespace densenet_efficient::cuda
