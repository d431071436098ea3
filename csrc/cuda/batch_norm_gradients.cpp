#include "cuda/kernels/batch_norm_gradients.h"

#include "cuda/host.h"
#include "operators.h"

namespace densenet_efficient::cuda {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace

void batch_norm_gradients(const Tensor& sum_grad, const Tensor& sum_grad_x, const Tensor& rstd, const Tensor& scale,
                          int64_t count, const OptionalTensor& grad_weight, const OptionalTensor& slope,
                          const OptionalTensor& offset) {
  const int64_t columns = sum_grad.size(0);
  check_accumulation_dtype(sum_grad, "sum_grad");
  check_vector(sum_grad, "sum_grad", columns, sum_grad);
  check_vector(sum_grad_x, "sum_grad_x", columns, sum_grad);
  check_vector(rstd, "rstd", columns, sum_grad);
  check_vector(scale, "scale", columns, sum_grad);
  TORCH_CHECK(slope.has_value() == offset.has_value(), "slope and offset must be given together");
  TORCH_CHECK(count > 0 || !slope, "count must be positive, got ", count);
  const BatchNormGradients arguments{
      .dtype = sum_grad.scalar_type(),
      .columns = columns,
      .sum_grad = sum_grad.const_data_ptr(),
      .sum_grad_x = sum_grad_x.const_data_ptr(),
      .rstd = rstd.const_data_ptr(),
      .scale = scale.const_data_ptr(),
      .count = count,
      .grad_weight = optional_vector(grad_weight, "grad_weight", columns, sum_grad),
      .slope = optional_vector(slope, "slope", columns, sum_grad),
      .offset = optional_vector(offset, "offset", columns, sum_grad),
  };
  launch_for(sum_grad, [&](cudaStream_t stream) { batch_norm_gradients(arguments, stream); });
}

}  // namespace densenet_efficient::cuda
