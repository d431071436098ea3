#include <cmath>

#include "cuda/kernels/batch_norm_affine.h"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/tiling.cuh"

namespace densenet_efficient::cuda {
namespace {

template <typename A>
__device__ A load(const AnyVector& vector, int64_t at) {
  switch (vector.dtype) {
    case c10::ScalarType::Double:
      return static_cast<A>(static_cast<const double*>(vector.data)[at]);
    case c10::ScalarType::BFloat16:
      return static_cast<A>(static_cast<float>(static_cast<const c10::BFloat16*>(vector.data)[at]));
    case c10::ScalarType::Half:
      return static_cast<A>(static_cast<float>(static_cast<const c10::Half*>(vector.data)[at]));
    default:
      return static_cast<A>(static_cast<const float*>(vector.data)[at]);
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) affine_of(BatchNormAffine p) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= p.columns) return;
  A* affine = static_cast<A*>(p.affine) + column;
  const A mean = load<A>(p.mean, column);
  const A rstd = A(1) / std::sqrt(load<A>(p.variance, column) + static_cast<A>(p.eps));
  const A scale = load<A>(p.weight, column) * rstd;
  affine[0] = mean;
  affine[p.columns] = rstd;
  affine[2 * p.columns] = scale;
  affine[3 * p.columns] = load<A>(p.bias, column) - mean * scale;
}

}  // namespace

void batch_norm_affine(const BatchNormAffine& p, cudaStream_t stream) {
  const int64_t blocks = ceil_div(p.columns, kThreads);
  if (p.dtype == c10::ScalarType::Double) return launch(affine_of<double>, blocks, kThreads, stream, p);
  launch(affine_of<float>, blocks, kThreads, stream, p);
}

}  // namespace densenet_efficient::cuda
