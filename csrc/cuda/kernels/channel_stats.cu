#include "cuda/kernels/channel_stats.h"
#include "cuda/kernels/reduction.cuh"

namespace densenet_efficient::cuda {
namespace {

constexpr int kRowsAtOnce = 4;  // loads in flight per thread

// Mean and sum of squared deviations of each column of a tile.
template <typename S, bool kAligned>
__global__ void __launch_bounds__(kThreads) tile_moments(Matrix<const void> x, Tiling tiling, Accumulate<S>* partials) {
  using A = Accumulate<S>;
  constexpr int kColumns = kWidth<S>;
  const Place place = Place::of<S>(tiling);
  const S* from = static_cast<const S*>(x.data) + place.column;
  Moments<A, kColumns> moments{};
  for (int64_t row = place.row; row < place.end; row += kRowsAtOnce * tiling.lanes_y) {
    Columns<S, kAligned> loaded[kRowsAtOnce];
    int present = 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      if (row + i * tiling.lanes_y >= place.end) continue;
      loaded[i].load(from + (row + i * tiling.lanes_y) * x.stride, place.columns);
      present++;
    }
    add_rows<A>(moments, loaded, present);
  }
  merge_lanes<A>(moments, place.lane_y, tiling.lanes_x, tiling.lanes_y);
  if (place.lane_y == 0) store_part<A, kColumns>(moments.values, partials, place, tiling.columns);
}

Tiling tiling_of(const ChannelStats& p) {
  return Tiling::of(p.rows, p.columns, static_cast<int64_t>(c10::elementSize(p.dtype)), kRowsAtOnce);
}

}  // namespace

int64_t partials_of(const ChannelStats& arguments) { return 2 * tiling_of(arguments).tiles * arguments.columns; }

void channel_stats(const ChannelStats& p, void* partials, cudaStream_t stream) {
  const Tiling tiling = tiling_of(p);
  dispatch(
      p.dtype, p.columns,
      [&]<typename S, bool kAligned>() {
        using A = Accumulate<S>;
        launch(tile_moments<S, kAligned>, tiling.blocks(), kThreads, stream, p.x, tiling, static_cast<A*>(partials));
        merge_moments_of_tiles<A>(partials, tiling, p.mean, p.variance, stream);
      },
      p.x);
}

}  // namespace densenet_efficient::cuda
