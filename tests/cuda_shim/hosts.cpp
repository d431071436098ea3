// The host functions of csrc/cuda, registered for CPU tensors as the operators of the namespace cuda_shim; test only.
#include <torch/library.h>

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, library) _TORCH_LIBRARY_IMPL(cuda_shim, CPU, library, C10_UID)

#include "cuda/batch_norm_affine.cpp"
#include "cuda/batch_norm_gradients.cpp"
#include "cuda/bn_relu_avg_pool.cpp"
#include "cuda/bn_relu_max_pool.cpp"
#include "cuda/channel_stats.cpp"
#include "cuda/project_gradient.cpp"
#include "cuda/write_with_statistics.cpp"
