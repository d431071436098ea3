#include "cuda/kernels/bn_relu_avg_pool.h"
#include "cuda/kernels/deposit.cuh"

namespace densenet_efficient::cuda {
namespace {

constexpr int64_t kBlocks = 4096;
constexpr uint32_t kLargeWindow = 16;  // pixels from which on a block shares one window
constexpr int kRowsAtOnce = 2;

// The pixel where the window of an output begins.
__device__ int64_t window_origin(const Windows& w, uint32_t output) {
  const uint32_t x = output % w.out_width, rest = output / w.out_width;
  const uint32_t y = rest % w.out_height, image = rest / w.out_height;
  return (int64_t{image} * w.height + y * w.window_height) * w.width + x * w.window_width;
}

// The output whose window holds a pixel; -1 where none does.
__device__ int64_t output_of(const Windows& w, uint32_t pixel) {
  const uint32_t x = pixel % w.width / w.window_width, rest = pixel / w.width;
  const uint32_t y = rest % w.height / w.window_height, image = rest / w.height;
  if (x >= w.out_width || y >= w.out_height) return -1;
  return (int64_t{image} * w.out_height + y) * w.out_width + x;
}

// One thread per output and columns; kSide is the side of the window where it is known, else 0.
template <typename S, bool kAligned, int kSide>
__global__ void __launch_bounds__(kThreads) pool_small_windows(AvgPoolForward p, Tiling tiling) {
  using A = Accumulate<S>;
  const Place place = Place::of<S>(tiling);
  const CoefficientsOf<S> scale(p.scale, place), shift(p.shift, place);
  const uint32_t window_height = kSide ? kSide : p.windows.window_height;
  const uint32_t window_width = kSide ? kSide : p.windows.window_width;
  const A inverse_size = A(1) / static_cast<A>(window_height * window_width);
  const S* x = static_cast<const S*>(p.x.data) + place.column;
  S* out = static_cast<S*>(p.out.data) + place.column;
  for (int64_t output = place.row; output < place.end; output += tiling.lanes_y) {
    const S* window = x + window_origin(p.windows, static_cast<uint32_t>(output)) * p.x.stride;
    A sums[kWidth<S>] = {};
#pragma unroll
    for (uint32_t dy = 0; dy < window_height; dy++) {
#pragma unroll
      for (uint32_t dx = 0; dx < window_width; dx++) {
        Columns<S, kAligned> values;
        values.load(window + (int64_t{dy} * p.windows.width + dx) * p.x.stride, place.columns);
#pragma unroll
        for (int j = 0; j < kWidth<S>; j++) sums[j] += relu(affine(values[j], scale[j], shift[j]));
      }
    }
    Columns<S, kAligned> means;
#pragma unroll
    for (int j = 0; j < kWidth<S>; j++) means.values[j] = static_cast<S>(sums[j] * inverse_size);
    means.store(out + output * p.out.stride, place.columns);
  }
}

// The sums of one window.
template <typename A, int kColumns>
struct WindowSums {
  A values[kColumns];

  __device__ void merge(const WindowSums& other) {
#pragma unroll
    for (int j = 0; j < kColumns; j++) values[j] += other.values[j];
  }
};

// One block per output and span of columns: its rows of threads share the pixels of the window.
template <typename S, bool kAligned>
__global__ void __launch_bounds__(kThreads) pool_large_windows(AvgPoolForward p, Tiling tiling) {
  using A = Accumulate<S>;
  const Place place = Place::of<S>(tiling);
  const CoefficientsOf<S> scale(p.scale, place), shift(p.shift, place);
  const uint32_t size = p.windows.window_height * p.windows.window_width;
  const S* x = static_cast<const S*>(p.x.data) + place.column;
  const S* window = x + window_origin(p.windows, static_cast<uint32_t>(place.tile)) * p.x.stride;
  WindowSums<A, kWidth<S>> sums{};
  for (uint32_t pixel = place.lane_y; place.columns > 0 && pixel < size; pixel += tiling.lanes_y) {
    const int64_t dy = pixel / p.windows.window_width, dx = pixel % p.windows.window_width;
    Columns<S, kAligned> values;
    values.load(window + (dy * p.windows.width + dx) * p.x.stride, place.columns);
#pragma unroll
    for (int j = 0; j < kWidth<S>; j++) sums.values[j] += relu(affine(values[j], scale[j], shift[j]));
  }
  merge_lanes<A>(sums, place.lane_y, tiling.lanes_x, tiling.lanes_y);
  if (place.lane_y != 0 || place.columns == 0) return;
  const A inverse_size = A(1) / static_cast<A>(size);
  Columns<S, kAligned> means;
#pragma unroll
  for (int j = 0; j < kWidth<S>; j++) means.values[j] = static_cast<S>(sums.values[j] * inverse_size);
  means.store(static_cast<S*>(p.out.data) + place.tile * p.out.stride + place.column, place.columns);
}

// One thread per pixel and columns.
template <typename S, bool kAligned>
__global__ void __launch_bounds__(kThreads) pool_backward(AvgPoolBackward p, Tiling tiling, Accumulate<S>* partials) {
  using A = Accumulate<S>;
  const Place place = Place::of<S>(tiling);
  Deposit<S> deposit(p.mean, p.scale, p.shift, place);
  const A inverse_size = A(1) / static_cast<A>(p.windows.window_height * p.windows.window_width);
  const S* x = static_cast<const S*>(p.x.data) + place.column;
  const S* out_grad = static_cast<const S*>(p.out_grad.data) + place.column;
  S* grad = p.grad.data ? static_cast<S*>(p.grad.data) + place.column : nullptr;
  const bool adds = grad != nullptr && p.accumulate;
  for (int64_t row = place.row; row < place.end; row += kRowsAtOnce * tiling.lanes_y) {
    Columns<S, kAligned> values[kRowsAtOnce], gradients[kRowsAtOnce], before[kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      const int64_t at = row + i * tiling.lanes_y;
      if (at >= place.end) continue;
      const int64_t output = output_of(p.windows, static_cast<uint32_t>(at));
      values[i].load(x + at * p.x.stride, place.columns);
      gradients[i] = {};
      if (output >= 0) gradients[i].load(out_grad + output * p.out_grad.stride, place.columns);
      if (adds) before[i].load(grad + at * p.grad.stride, place.columns);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      const int64_t at = row + i * tiling.lanes_y;
      if (at >= place.end) continue;
      Columns<S, kAligned> after;
#pragma unroll
      for (int j = 0; j < kWidth<S>; j++) {
        const A scaled = deposit.take(j, values[i][j], gradients[i][j] * inverse_size);
        after.values[j] = static_cast<S>(adds ? before[i][j] + scaled : scaled);
      }
      if (grad != nullptr) after.store(grad + at * p.grad.stride, place.columns);
    }
  }
  deposit.finish(partials, place, tiling);
}

Tiling tiling_of(const AvgPoolBackward& p) {
  return Tiling::of(p.windows.pixels(), p.columns, static_cast<int64_t>(c10::elementSize(p.dtype)), kRowsAtOnce);
}

}  // namespace

void bn_relu_avg_pool(const AvgPoolForward& p, cudaStream_t stream) {
  const Windows& w = p.windows;
  dispatch(
      p.dtype, p.columns,
      [&]<typename S, bool kAligned>() {
        Tiling tiling = Tiling::of(w.outputs(), p.columns, sizeof(S), 1, kBlocks);
        if (w.window_height * w.window_width >= kLargeWindow) {
          tiling.tiles = w.outputs();
          tiling.tile_rows = 1;
          launch(pool_large_windows<S, kAligned>, tiling.blocks(), kThreads, stream, p, tiling);
        } else if (w.window_height == 2 && w.window_width == 2) {
          launch(pool_small_windows<S, kAligned, 2>, tiling.blocks(), kThreads, stream, p, tiling);
        } else {
          launch(pool_small_windows<S, kAligned, 0>, tiling.blocks(), kThreads, stream, p, tiling);
        }
      },
      p.x, p.out);
}

int64_t partials_of(const AvgPoolBackward& arguments) { return 2 * tiling_of(arguments).tiles * arguments.columns; }

void bn_relu_avg_pool_backward(const AvgPoolBackward& p, void* partials, cudaStream_t stream) {
  const Tiling tiling = tiling_of(p);
  dispatch(
      p.dtype, p.columns,
      [&]<typename S, bool kAligned>() {
        using A = Accumulate<S>;
        launch(pool_backward<S, kAligned>, tiling.blocks(), kThreads, stream, p, tiling, static_cast<A*>(partials));
        merge_sums_of_tiles<A>(partials, tiling.tiles, p.columns, p.sum_grad, p.sum_grad_x, stream);
      },
      p.out_grad, p.x, p.grad);
}

}  // namespace densenet_efficient::cuda
