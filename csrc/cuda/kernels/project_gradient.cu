#include "batch_norm.h"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/project_gradient.h"
#include "cuda/kernels/tiling.cuh"

namespace densenet_efficient::cuda {
namespace {

constexpr int kRowsAtOnce = 4;
constexpr int64_t kBlocks = 4096;  // several waves, which level out; each loads the coefficients once

template <typename S, bool kAligned>
__global__ void __launch_bounds__(kThreads) project(ProjectGradient p, Tiling tiling) {
  const Place place = Place::of<S>(tiling);
  const CoefficientsOf<S> mean(p.mean, place), slope(p.slope, place), offset(p.offset, place);
  const S* x = static_cast<const S*>(p.x.data) + place.column;
  S* grad = static_cast<S*>(p.grad.data) + place.column;
  for (int64_t row = place.row; row < place.end; row += kRowsAtOnce * tiling.lanes_y) {
    Columns<S, kAligned> values[kRowsAtOnce], gradients[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      const int64_t at = row + i * tiling.lanes_y;
      if (at >= place.end) continue;
      values[i].load(x + at * p.x.stride, place.columns);
      gradients[i].load(grad + at * p.grad.stride, place.columns);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      const int64_t at = row + i * tiling.lanes_y;
      if (at >= place.end) continue;
#pragma unroll
      for (int j = 0; j < kWidth<S>; j++) {
        gradients[i].values[j] = static_cast<S>(projected(gradients[i][j], values[i][j], mean[j], slope[j], offset[j]));
      }
      gradients[i].store(grad + at * p.grad.stride, place.columns);
    }
  }
}

}  // namespace

void project_gradient(const ProjectGradient& p, cudaStream_t stream) {
  dispatch(
      p.dtype, p.columns,
      [&]<typename S, bool kAligned>() {
        const Tiling tiling = Tiling::of(p.rows, p.columns, sizeof(S), kRowsAtOnce, kBlocks);
        launch(project<S, kAligned>, tiling.blocks(), kThreads, stream, p, tiling);
      },
      p.grad, p.x);
}

}  // namespace densenet_efficient::cuda
