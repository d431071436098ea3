// The host functions of csrc/cuda, registered for CPU tensors as the operators of the namespace cuda_shim; test only.
#include <torch/library.h>

#include "cuda/operators.h"

namespace densenet_efficient::cuda {

TORCH_LIBRARY_IMPL(cuda_shim, CPU, library) {
  library.impl("batch_norm_affine", &batch_norm_affine);
  library.impl("batch_norm_gradients", &batch_norm_gradients);
  library.impl("channel_stats", &channel_stats);
  library.impl("write_with_statistics", &write_with_statistics);
  library.impl("project_gradient", &project_gradient);
  library.impl("bn_relu_avg_pool", &bn_relu_avg_pool);
  library.impl("bn_relu_avg_pool_backward", &bn_relu_avg_pool_backward);
  library.impl("bn_relu_max_pool", &bn_relu_max_pool);
  library.impl("bn_relu_max_pool_backward", &bn_relu_max_pool_backward);
}

}  // namespace densenet_efficient::cuda

#include "cuda/batch_norm_affine.cpp"
#include "cuda/batch_norm_gradients.cpp"
#include "cuda/bn_relu_avg_pool.cpp"
#include "cuda/bn_relu_max_pool.cpp"
#include "cuda/channel_stats.cpp"
#include "cuda/project_gradient.cpp"
#include "cuda/write_with_statistics.cpp"
