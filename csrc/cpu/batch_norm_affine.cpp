#include <cmath>

#include "checks.h"
#include "operators.h"

namespace densenet_efficient {
namespace {

using at::Tensor;

template <typename A>
void fill(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias, double eps,
          const Tensor& affine) {
  const int64_t channels = affine.size(1);
  const A *means = mean.const_data_ptr<A>(), *variances = variance.const_data_ptr<A>();
  const A *gamma = weight.const_data_ptr<A>(), *beta = bias.const_data_ptr<A>();
  A* rows = affine.data_ptr<A>();
  A *to_mean = rows, *rstd = rows + channels, *scale = rstd + channels, *shift = scale + channels;
  for (int64_t c = 0; c < channels; c++) {
    to_mean[c] = means[c];
    rstd[c] = 1 / std::sqrt(variances[c] + static_cast<A>(eps));
    scale[c] = gamma[c] * rstd[c];
    shift[c] = beta[c] - means[c] * scale[c];
  }
}

}  // namespace

void batch_norm_affine(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias, double eps,
                       const Tensor& affine) {
  TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 4 && affine.is_contiguous(),
              "affine must be contiguous of shape [4, C], got ", affine.sizes());
  check_accumulation_dtype(affine, "affine");
  const auto run = affine.scalar_type() == at::kDouble ? &fill<double> : &fill<float>;
  const auto as_affine = [&](const Tensor& vector, const char* name) {
    return dense_norm_vector(vector, name, affine).to(affine.scalar_type());
  };
  run(as_affine(mean, "mean"), as_affine(variance, "variance"), as_affine(weight, "weight"), as_affine(bias, "bias"),
      eps, affine);
}

}  // namespace densenet_efficient
