#include "cuda/kernels/bn_relu_avg_pool.h"

#include "cuda/host.h"
#include "operators.h"

namespace densenet_efficient::cuda {
namespace {

using at::Tensor;

// The windows of the images whose pixels are the rows of x.
Windows windows_of(const Tensor& x, int64_t height, int64_t width, int64_t window_height, int64_t window_width) {
  const int64_t images = check_images(x, "x", height, width);
  check_window(height, width, window_height, window_width);
  check_pixels(x);
  return {
      .images = static_cast<uint32_t>(images),
      .height = static_cast<uint32_t>(height),
      .width = static_cast<uint32_t>(width),
      .window_height = static_cast<uint32_t>(window_height),
      .window_width = static_cast<uint32_t>(window_width),
      .out_height = static_cast<uint32_t>(height / window_height),
      .out_width = static_cast<uint32_t>(width / window_width),
  };
}

}  // namespace

void bn_relu_avg_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, int64_t height, int64_t width,
                      int64_t window_height, int64_t window_width, const Tensor& out) {
  check_storage_dtype(x);
  const int64_t columns = x.size(1);
  const Windows windows = windows_of(x, height, width, window_height, window_width);
  check_matrix(x, "x", x.size(0), columns, x);
  check_matrix(out, "out", windows.outputs(), columns, x);
  check_vector(scale, "scale", columns, x);
  check_vector(shift, "shift", columns, x);
  const AvgPoolForward arguments{
      .dtype = x.scalar_type(),
      .windows = windows,
      .columns = columns,
      .x = matrix_of(x),
      .scale = scale.const_data_ptr(),
      .shift = shift.const_data_ptr(),
      .out = mutable_matrix_of(out),
  };
  launch_for(x, [&](cudaStream_t stream) { bn_relu_avg_pool(arguments, stream); });
}

void bn_relu_avg_pool_backward(const Tensor& out_grad, const Tensor& x, const Tensor& mean, const Tensor& scale,
                               const Tensor& shift, int64_t height, int64_t width, int64_t window_height,
                               int64_t window_width, const std::optional<Tensor>& grad, bool accumulate,
                               const Tensor& sum_grad, const Tensor& sum_grad_x) {
  check_storage_dtype(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  const Windows windows = windows_of(x, height, width, window_height, window_width);
  check_matrix(x, "x", rows, columns, x);
  check_matrix(out_grad, "out_grad", windows.outputs(), columns, x);
  if (grad) check_matrix(*grad, "grad", rows, columns, x);
  check_vector(mean, "mean", columns, x);
  check_vector(scale, "scale", columns, x);
  check_vector(shift, "shift", columns, x);
  check_vector(sum_grad, "sum_grad", columns, x);
  check_vector(sum_grad_x, "sum_grad_x", columns, x);
  const AvgPoolBackward arguments{
      .dtype = x.scalar_type(),
      .windows = windows,
      .columns = columns,
      .out_grad = matrix_of(out_grad),
      .x = matrix_of(x),
      .mean = mean.const_data_ptr(),
      .scale = scale.const_data_ptr(),
      .shift = shift.const_data_ptr(),
      .grad = grad ? mutable_matrix_of(*grad) : Matrix<void>{},
      .accumulate = accumulate,
      .sum_grad = sum_grad.data_ptr(),
      .sum_grad_x = sum_grad_x.data_ptr(),
  };
  launch_with_partials(x, partials_of(arguments), [&](void* partials, cudaStream_t stream) {
    bn_relu_avg_pool_backward(arguments, partials, stream);
  });
}

}  // namespace densenet_efficient::cuda
