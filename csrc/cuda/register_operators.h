// What implements each operator on a GPU.
#pragma once

#include <torch/library.h>

#include "operators.h"

namespace densenet_efficient::cuda {

inline void register_operators(torch::Library& library) {
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
