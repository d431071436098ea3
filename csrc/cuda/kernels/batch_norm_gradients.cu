#include "cuda/kernels/batch_norm_gradients.h"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/tiling.cuh"

namespace densenet_efficient::cuda {
namespace {

template <typename A>
__global__ void __launch_bounds__(kThreads) gradients_of(BatchNormGradients p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= p.columns) return;
  const A sum_grad = static_cast<const A*>(p.sum_grad)[column];
  const A sum_grad_x = static_cast<const A*>(p.sum_grad_x)[column];
  const A rstd = static_cast<const A*>(p.rstd)[column];
  if (p.grad_weight != nullptr) static_cast<A*>(p.grad_weight)[column] = sum_grad_x * rstd;
  if (p.slope == nullptr) return;
  const A share = static_cast<const A*>(p.scale)[column] / static_cast<A>(p.count);
  static_cast<A*>(p.offset)[column] -= share * sum_grad;
  static_cast<A*>(p.slope)[column] -= share * rstd * rstd * sum_grad_x;
}

}  // namespace

void batch_norm_gradients(const BatchNormGradients& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.columns, kThreads);
  if (p.dtype == c10::ScalarType::Double) return launch(gradients_of<double>, blocks, kThreads, stream, p);
  launch(gradients_of<float>, blocks, kThreads, stream, p);
}

}  // namespace densenet_efficient::cuda
