#include "cuda/kernels/project_gradient.h"

#include "cuda/host.h"
#include "operators.h"

namespace densenet_efficient::cuda {

using at::Tensor;

void project_gradient(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& slope,
                      const Tensor& offset) {
  check_storage_dtype(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  check_matrix(x, "x", rows, columns, x);
  check_matrix(grad, "grad", rows, columns, x);
  check_vector(mean, "mean", columns, x);
  check_vector(slope, "slope", columns, x);
  check_vector(offset, "offset", columns, x);
  const ProjectGradient arguments{
      .dtype = x.scalar_type(),
      .grad = mutable_matrix_of(grad),
      .x = matrix_of(x),
      .rows = rows,
      .columns = columns,
      .mean = mean.const_data_ptr(),
      .slope = slope.const_data_ptr(),
      .offset = offset.const_data_ptr(),
  };
  launch_for(x, [&](cudaStream_t stream) { project_gradient(arguments, stream); });
}

}  // namespace densenet_efficient::cuda
