#include "cuda/kernels/batch_norm_affine.h"

#include "cuda/host.h"
#include "operators.h"

namespace densenet_efficient::cuda {
namespace {

using at::Tensor;

AnyVector any_vector(const Tensor& vector) {
  check_storage_dtype(vector);
  return {vector.const_data_ptr(), vector.scalar_type()};
}

}  // namespace

void batch_norm_affine(const Tensor& mean, const Tensor& variance, const Tensor& weight, const Tensor& bias, double eps,
                       const Tensor& affine) {
  TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 4 && affine.is_contiguous(),
              "affine must be contiguous of shape [4, C], got ", affine.sizes());
  check_accumulation_dtype(affine, "affine");
  const Tensor dense_mean = dense_norm_vector(mean, "mean", affine),
               dense_weight = dense_norm_vector(weight, "weight", affine),
               dense_variance = dense_norm_vector(variance, "variance", affine),
               dense_bias = dense_norm_vector(bias, "bias", affine);
  const BatchNormAffine arguments{
      .dtype = affine.scalar_type(),
      .columns = affine.size(1),
      .mean = any_vector(dense_mean),
      .variance = any_vector(dense_variance),
      .weight = any_vector(dense_weight),
      .bias = any_vector(dense_bias),
      .eps = eps,
      .affine = affine.data_ptr(),
  };
  launch_for(affine, [&](cudaStream_t stream) { batch_norm_affine(arguments, stream); });
}

}  // namespace densenet_efficient::cuda
