#include "cuda/kernels/bn_relu_max_pool.h"
#include "cuda/kernels/deposit.cuh"

namespace densenet_efficient::cuda {
namespace {

constexpr int64_t kBlocks = 4096;

// The maximum of a window in each of some columns, and its place: 0 to 8, row-major. Output i pools the inputs 2 i - 1,
// 2 i and 2 i + 1 that exist, along each dimension.
template <typename A, int kColumns>
struct Maximum {
  A value[kColumns];
  uint8_t place[kColumns];

  // torch's rule: the first of equals stays, NaN beats everything.
  __device__ void take(int j, A candidate, int candidate_place) {
    if (!(candidate > value[j] || candidate != candidate)) return;
    value[j] = candidate;
    place[j] = static_cast<uint8_t>(candidate_place);
  }
};

// Which of them is the first is asked of the activations as type T would store them.
template <typename S, bool kAligned, typename T>
__device__ Maximum<Accumulate<S>, kWidth<S>> maximum_of(const PooledImages& images, int image, int out_y, int out_x,
                                                        const S* x, int64_t stride, const Place& place,
                                                        const CoefficientsOf<S>& scale,
                                                        const CoefficientsOf<S>& shift) {
  Maximum<Accumulate<S>, kWidth<S>> maximum;
#pragma unroll
  for (int j = 0; j < kWidth<S>; j++) {
    maximum.value[j] = -1;  // below every activation
    maximum.place[j] = 0;
  }
#pragma unroll
  for (int row = 0; row < 3; row++) {
    const int at_y = 2 * out_y + row - 1;
    if (at_y < 0 || at_y >= images.height) continue;
    const S* from = x + (int64_t{image} * images.height + at_y) * images.width * stride;
#pragma unroll
    for (int column = 0; column < 3; column++) {
      const int at_x = 2 * out_x + column - 1;
      if (at_x < 0 || at_x >= images.width) continue;
      Columns<S, kAligned> values;
      values.load(from + at_x * stride, place.columns);
#pragma unroll
      for (int j = 0; j < kWidth<S>; j++) {
        maximum.take(j, rounded<T>(relu(affine(values[j], scale[j], shift[j]))), 3 * row + column);
      }
    }
  }
  return maximum;
}

// One thread per output and columns.
template <typename S, bool kAligned>
__global__ void __launch_bounds__(kThreads) pool(MaxPoolForward p, Tiling tiling) {
  const Place place = Place::of<S>(tiling);
  const CoefficientsOf<S> scale(p.scale, place), shift(p.shift, place);
  const S* x = static_cast<const S*>(p.x.data) + place.column;
  S* out = static_cast<S*>(p.out.data) + place.column;
  for (int64_t output = place.row; output < place.end; output += tiling.lanes_y) {
    const int index = static_cast<int>(output), rest = index / p.images.out_width;
    const auto maximum =
        maximum_of<S, kAligned, Accumulate<S>>(p.images, rest / p.images.out_height, rest % p.images.out_height,
                                               index % p.images.out_width, x, p.x.stride, place, scale, shift);
    Columns<S, kAligned> pooled;
#pragma unroll
    for (int j = 0; j < kWidth<S>; j++) pooled.values[j] = static_cast<S>(maximum.value[j]);
    pooled.store(out + output * p.out.stride, place.columns);
  }
}

// ---- backward: every input gathers from the windows that contain it, so that no two threads write to one place. A
// block finds the places of the maxima of a square of outputs once, with one row and column more that reach into its
// inputs; then a thread takes the 2x2 inputs of an output, whose maxima are those of this output and its neighbours.

constexpr int kSide = 8;  // outputs along a side of the square
constexpr int kReach = kSide + 1;
constexpr uint8_t kNowhere = 255;

// How the squares of an image are dealt to blocks: strips of neighbouring squares.
struct Strips {
  int down, across;  // squares of an image
  int length;        // squares of a strip
  int per_row;       // strips

  Strips(const PooledImages& images, int64_t spans)
      : down(static_cast<int>(ceil_div(images.out_height, kSide))),
        across(static_cast<int>(ceil_div(images.out_width, kSide))) {
    const int64_t squares = int64_t{images.images} * down * across * spans;
    const int64_t longest = std::clamp<int64_t>(squares / kMostBlocks, 1, across);
    per_row = static_cast<int>(ceil_div(across, longest));
    length = static_cast<int>(ceil_div(across, per_row));
  }
};

template <typename S>
struct alignas(kWidth<S>) Places {
  uint8_t of[kWidth<S>];
};

// The places of the maxima in a square, with its reach: of each output and each thread of a row.
template <typename S>
using Maxima = Places<S>[kReach * kReach][kMostLanesX];

struct Square {
  int image, out_y, out_x;  // its first output
};

template <typename S, bool kAligned>
__device__ void find_maxima(const MaxPoolBackward& p, const Square& square, const Place& place, int lanes_y,
                            const Deposit<S>& deposit, Maxima<S>& maxima) {
  const S* x = static_cast<const S*>(p.x.data) + place.column;
  for (int w = place.lane_y; w < kReach * kReach; w += lanes_y) {
    const int out_y = square.out_y + w / kReach, out_x = square.out_x + w % kReach;
    Places<S> found;
#pragma unroll
    for (int j = 0; j < kWidth<S>; j++) found.of[j] = kNowhere;
    if (place.columns > 0 && out_y < p.images.out_height && out_x < p.images.out_width) {
      const auto maximum = maximum_of<S, kAligned, S>(p.images, square.image, out_y, out_x, x, p.x.stride, place,
                                                      deposit.scale, deposit.shift);
#pragma unroll
      for (int j = 0; j < kWidth<S>; j++) found.of[j] = maximum.place[j];
    }
    maxima[w][place.lane_x] = found;
  }
}

// Gathers, masks and sums the gradient of the 2x2 inputs of each output, and leaves scale times it in grad.
template <typename S, bool kAligned>
__device__ void gather(const MaxPoolBackward& p, const Square& square, const Place& place, int lanes_y,
                       const Maxima<S>& maxima, Deposit<S>& deposit) {
  using A = Accumulate<S>;
  const PooledImages& images = p.images;
  const S* x = static_cast<const S*>(p.x.data) + place.column;
  const S* out_grad = static_cast<const S*>(p.out_grad.data) + place.column;
  S* grad = static_cast<S*>(p.grad.data) + place.column;
  for (int output = place.lane_y; place.columns > 0 && output < kSide * kSide; output += lanes_y) {
    const int out_y = square.out_y + output / kSide, out_x = square.out_x + output % kSide;
    if (out_y >= images.out_height || out_x >= images.out_width) continue;
    Places<S> places[2][2];  // of this output and its neighbours, below and to the right
    Columns<S, kAligned> flows[2][2];
#pragma unroll
    for (int down = 0; down < 2; down++) {
#pragma unroll
      for (int right = 0; right < 2; right++) {
        places[down][right] = maxima[(output / kSide + down) * kReach + output % kSide + right][place.lane_x];
        if (out_y + down >= images.out_height || out_x + right >= images.out_width) continue;
        const int64_t row = (int64_t{square.image} * images.out_height + out_y + down) * images.out_width + out_x;
        flows[down][right].load(out_grad + (row + right) * p.out_grad.stride, place.columns);
      }
    }
#pragma unroll
    for (int dy = 0; dy < 2; dy++) {
#pragma unroll
      for (int dx = 0; dx < 2; dx++) {
        const int in_y = 2 * out_y + dy, in_x = 2 * out_x + dx;
        if (in_y >= images.height || in_x >= images.width) continue;
        const int64_t input = (int64_t{square.image} * images.height + in_y) * images.width + in_x;
        Columns<S, kAligned> values, scaled;
        values.load(x + input * p.x.stride, place.columns);
#pragma unroll
        for (int j = 0; j < kWidth<S>; j++) {
          A gradient = 0;
#pragma unroll
          for (int down = 0; down <= dy; down++) {
#pragma unroll
            for (int right = 0; right <= dx; right++) {
              const int here = 3 * (dy - 2 * down + 1) + (dx - 2 * right + 1);  // this input, in that window
              if (places[down][right].of[j] == here) gradient += flows[down][right][j];
            }
          }
          scaled.values[j] = static_cast<S>(deposit.take(j, values[j], gradient));
        }
        scaled.store(grad + input * p.grad.stride, place.columns);
      }
    }
  }
}

template <typename S, bool kAligned>
__global__ void __launch_bounds__(kThreads, 2)  // two blocks at a time, or too little is in flight
    pool_backward(MaxPoolBackward p, Tiling tiling, Strips strips, Accumulate<S>* partials) {
  __shared__ Maxima<S> maxima;
  const Place place = Place::of<S>(tiling);
  const int strip = static_cast<int>(place.tile % strips.per_row), row = static_cast<int>(place.tile / strips.per_row);
  const int begin = strip * strips.length, end = begin + strips.length;
  Deposit<S> deposit(p.mean, p.scale, p.shift, place);
  for (int index = begin; index < end && index < strips.across; index++) {
    const Square square{row / strips.down, row % strips.down * kSide, index * kSide};
    find_maxima<S, kAligned>(p, square, place, tiling.lanes_y, deposit, maxima);
    __syncthreads();
    gather<S, kAligned>(p, square, place, tiling.lanes_y, maxima, deposit);
    __syncthreads();
  }
  deposit.finish(partials, place, tiling);
}

// One tile per strip; the rows of a tile are not those of the matrix, and not used.
Tiling tiling_of(const MaxPoolBackward& p) {
  const auto size = static_cast<int64_t>(c10::elementSize(p.dtype));
  Tiling tiling = Tiling::of(0, p.columns, size, 1);
  const Strips strips(p.images, tiling.spans);
  tiling.tiles = int64_t{p.images.images} * strips.down * strips.per_row;
  return tiling;
}

}  // namespace

void bn_relu_max_pool(const MaxPoolForward& p, cudaStream_t stream) {
  dispatch(
      p.dtype, p.columns,
      [&]<typename S, bool kAligned>() {
        const Tiling tiling = Tiling::of(p.images.outputs(), p.columns, sizeof(S), 1, kBlocks);
        launch(pool<S, kAligned>, tiling.blocks(), kThreads, stream, p, tiling);
      },
      p.x, p.out);
}

int64_t partials_of(const MaxPoolBackward& arguments) { return 2 * tiling_of(arguments).tiles * arguments.columns; }

void bn_relu_max_pool_backward(const MaxPoolBackward& p, void* partials, cudaStream_t stream) {
  const Tiling tiling = tiling_of(p);
  const Strips strips(p.images, tiling.spans);
  dispatch(
      p.dtype, p.columns,
      [&]<typename S, bool kAligned>() {
        using A = Accumulate<S>;
        launch(pool_backward<S, kAligned>, tiling.blocks(), kThreads, stream, p, tiling, strips,
               static_cast<A*>(partials));
        merge_sums_of_tiles<A>(partials, tiling.tiles, p.columns, p.sum_grad, p.sum_grad_x, stream);
      },
      p.out_grad, p.x, p.grad);
}

}  // namespace densenet_efficient::cuda
