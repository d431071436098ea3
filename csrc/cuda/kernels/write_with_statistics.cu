#include "cuda/kernels/reduction.cuh"
#include "cuda/kernels/write_with_statistics.h"

namespace densenet_efficient::cuda {
namespace {

constexpr int kRowsAtOnce = 4;  // of a thread; as in channel_stats, whose bits these are

// The first channel of a pixel, which the matrix has as a row.
template <typename S>
__device__ const S* pixel_of(const FlatImages& x, int64_t row) {
  const uint32_t image = static_cast<uint32_t>(row) / x.pixels, pixel = static_cast<uint32_t>(row) % x.pixels;
  return static_cast<const S*>(x.data) + image * x.image_stride + pixel * x.pixel_stride;
}

// Channels-last images: a thread reads its columns where they are.
template <typename S, bool kAligned>
class SideBySide {
 public:
  __device__ SideBySide(const FlatImages& x, const Tiling&) : x_(x) {}

  __device__ void fetch(const Place&, int64_t) {}

  __device__ void load(Columns<S, kAligned>& to, const Place& place, int64_t row) const {
    to.load(pixel_of<S>(x_, row) + place.column, place.columns);
  }

 private:
  const FlatImages& x_;
};

// Images of any other strides, contiguous ones above all: the block reads each channel along its pixels, which lie side
// by side, and turns them by way of shared memory. One more pixel per channel keeps its banks apart.
template <typename S, bool kAligned>
class Transposed {
 public:
  __device__ Transposed(const FlatImages& x, const Tiling& tiling)
      : x_(x), pixels_(kRowsAtOnce * tiling.lanes_y), columns_(tiling.lanes_x * kWidth<S>), tiling_(tiling) {
    __shared__ S tile[kThreads * kRowsAtOnce * kWidth<S> + kMostLanesX * kWidth<S>];  // [columns, pixels + 1]
    tile_ = tile;
  }

  // All threads of the block take part.
  __device__ void fetch(const Place& place, int64_t first_row) {
    __syncthreads();  // what was fetched before has been read
    const int64_t first_column = place.column - place.lane_x * kWidth<S>;
    const int side_by_side = pixels_ < kThreads ? pixels_ : kThreads;
    for (int i = static_cast<int>(threadIdx.x) % side_by_side; i < pixels_; i += side_by_side) {
      if (first_row + i >= tiling_.rows) break;
      const S* from = pixel_of<S>(x_, first_row + i) + first_column * x_.channel_stride;
      for (int c = static_cast<int>(threadIdx.x) / side_by_side; c < columns_; c += kThreads / side_by_side) {
        if (first_column + c < tiling_.columns) tile_[c * (pixels_ + 1) + i] = from[c * x_.channel_stride];
      }
    }
    first_row_ = first_row;
    __syncthreads();
  }

  __device__ void load(Columns<S, kAligned>& to, const Place& place, int64_t row) const {
    const S* from = tile_ + place.lane_x * kWidth<S> * (pixels_ + 1) + (row - first_row_);
#pragma unroll
    for (int j = 0; j < kWidth<S>; j++) {
      to.values[j] = j < place.columns ? from[j * (pixels_ + 1)] : static_cast<S>(0.0f);
    }
  }

 private:
  const FlatImages& x_;
  int pixels_, columns_;
  const Tiling& tiling_;
  S* tile_;
  int64_t first_row_ = 0;
};

template <typename S, bool kAligned, template <typename, bool> typename Source>
__global__ void __launch_bounds__(kThreads) write_tile(WriteWithStatistics p, Tiling tiling, Accumulate<S>* partials) {
  using A = Accumulate<S>;
  constexpr int kColumns = kWidth<S>;
  const Place place = Place::of<S>(tiling);
  S* out = static_cast<S*>(p.out.data) + place.column;
  Source<S, kAligned> source(p.x, tiling);
  Moments<A, kColumns> moments{};
  const int64_t first = place.tile * tiling.tile_rows, last = first + tiling.tile_rows;
  for (int64_t start = first; start < last && start < tiling.rows; start += kRowsAtOnce * tiling.lanes_y) {
    source.fetch(place, start);
    Columns<S, kAligned> loaded[kRowsAtOnce];
    int present = 0;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      const int64_t row = start + place.lane_y + i * tiling.lanes_y;
      if (row >= place.end) continue;
      source.load(loaded[i], place, row);
      present++;
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; i++) {
      if (i < present) loaded[i].store(out + (start + place.lane_y + i * tiling.lanes_y) * p.out.stride, place.columns);
    }
    add_rows<A>(moments, loaded, present);
  }
  merge_lanes<A>(moments, place.lane_y, tiling.lanes_x, tiling.lanes_y);
  if (place.lane_y == 0) store_part<A, kColumns>(moments.values, partials, place, tiling.columns);
}

Tiling tiling_of(const WriteWithStatistics& p) {
  return Tiling::of(p.rows, p.columns, static_cast<int64_t>(c10::elementSize(p.dtype)), kRowsAtOnce);
}

template <template <typename, bool> typename Source, typename... Matrices>
void write_from(const WriteWithStatistics& p, void* partials, cudaStream_t stream, const Matrices&... matrices) {
  const Tiling tiling = tiling_of(p);
  dispatch(
      p.dtype, p.columns,
      [&]<typename S, bool kAligned>() {
        using A = Accumulate<S>;
        launch(write_tile<S, kAligned, Source>, tiling.blocks(), kThreads, stream, p, tiling,
               static_cast<A*>(partials));
        merge_moments_of_tiles<A>(partials, tiling, p.mean, p.variance, stream);
      },
      p.out, matrices...);
}

}  // namespace

int64_t partials_of(const WriteWithStatistics& arguments) { return 2 * tiling_of(arguments).tiles * arguments.columns; }

void write_with_statistics(const WriteWithStatistics& p, void* partials, cudaStream_t stream) {
  if (p.x.has_channels_side_by_side()) {
    const Matrix<const void> images{p.x.data, p.x.image_stride}, pixels{p.x.data, p.x.pixel_stride};
    write_from<SideBySide>(p, partials, stream, images, pixels);
  } else {
    write_from<Transposed>(p, partials, stream);
  }
}

}  // namespace densenet_efficient::cuda
