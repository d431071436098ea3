// The host functions of csrc/cuda, registered for CPU tensors as the operators of the namespace cuda_shim; test only.
#include "cuda/register_operators.h"

TORCH_LIBRARY_IMPL(cuda_shim, CPU, library) { densenet_efficient::cuda::register_operators(library); }

#include "cuda/batch_norm_affine.cpp"
#include "cuda/batch_norm_gradients.cpp"
#include "cuda/bn_relu_avg_pool.cpp"
#include "cuda/bn_relu_max_pool.cpp"
#include "cuda/channel_stats.cpp"
#include "cuda/project_gradient.cpp"
#include "cuda/write_with_statistics.cpp"
