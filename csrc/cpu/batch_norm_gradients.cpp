#include "checks.h"
#include "operators.h"

namespace densenet_efficient {
namespace {

using at::Tensor;

template <typename A>
void add(const Tensor& sum_grad, const Tensor& sum_grad_x, const Tensor& rstd, const Tensor& scale, int64_t count,
         void* grad_weight, void* slope, void* offset) {
  const A *sums = sum_grad.const_data_ptr<A>(), *sums_x = sum_grad_x.const_data_ptr<A>();
  const A *rstds = rstd.const_data_ptr<A>(), *scales = scale.const_data_ptr<A>();
  const A share = A(1) / static_cast<A>(count);
  const int64_t channels = sum_grad.size(0);
  if (grad_weight) {
    for (int64_t c = 0; c < channels; c++) static_cast<A*>(grad_weight)[c] = sums_x[c] * rstds[c];
  }
  if (slope) {
    for (int64_t c = 0; c < channels; c++) {
      static_cast<A*>(offset)[c] -= scales[c] * share * sums[c];
      static_cast<A*>(slope)[c] -= scales[c] * share * rstds[c] * rstds[c] * sums_x[c];
    }
  }
}

}  // namespace

void batch_norm_gradients(const Tensor& sum_grad, const Tensor& sum_grad_x, const Tensor& rstd, const Tensor& scale,
                          int64_t count, const std::optional<Tensor>& grad_weight, const std::optional<Tensor>& slope,
                          const std::optional<Tensor>& offset) {
  const int64_t channels = sum_grad.size(0);
  check_accumulation_dtype(sum_grad, "sum_grad");
  check_vector(sum_grad, "sum_grad", channels, sum_grad);
  check_vector(sum_grad_x, "sum_grad_x", channels, sum_grad);
  check_vector(rstd, "rstd", channels, sum_grad);
  check_vector(scale, "scale", channels, sum_grad);
  TORCH_CHECK(slope.has_value() == offset.has_value(), "slope and offset must be given together");
  TORCH_CHECK(count > 0 || !slope, "count must be positive, got ", count);
  const auto run = sum_grad.scalar_type() == at::kDouble ? &add<double> : &add<float>;
  run(sum_grad, sum_grad_x, rstd, scale, count, optional_vector(grad_weight, "grad_weight", channels, sum_grad),
      optional_vector(slope, "slope", channels, sum_grad), optional_vector(offset, "offset", channels, sum_grad));
}

}  // namespace densenet_efficient
