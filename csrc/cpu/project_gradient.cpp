#include "cpu/kernels/project_gradient.h"

#include "checks.h"
#include "operators.h"

namespace densenet_efficient {

using at::Tensor;

void project_gradient(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& slope,
                      const Tensor& offset) {
  const int64_t rows = x.size(0), channels = x.size(1);
  check_matrix(x, "x", rows, channels, x);
  check_matrix(grad, "grad", rows, channels, x);
  check_vector(mean, "mean", channels, x);
  check_vector(slope, "slope", channels, x);
  check_vector(offset, "offset", channels, x);
  ProjectGradient arguments{};
  arguments.dtype = x.scalar_type();
  arguments.grad = grad.data_ptr();
  arguments.grad_stride = grad.stride(0);
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.rows = rows;
  arguments.channels = channels;
  arguments.mean = mean.const_data_ptr();
  arguments.slope = slope.const_data_ptr();
  arguments.offset = offset.const_data_ptr();
  DISPATCH_CAPABILITY(arguments.dtype, project_gradient)(arguments);
}

}  // namespace densenet_efficient
