#include <ATen/Parallel.h>

#include "cpu/kernels/bn_relu_conv3x3.h"
#include "cpu/kernels/conv3x3_weight.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/image_tiles.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/tasks.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kMostGroups = 32;  // of tiles; each group has partial sums of its own
constexpr int64_t kDepth = 128;      // pixels per product of the weight's gradient

// What the groups leave: the weight's gradient as [9, outputs, channels], and the sums.
template <typename A>
struct Partials {
  int64_t weight_size, channels;
  Scratch<A> grad_weight, sums;

  Partials(int64_t groups, int64_t outputs, int64_t channels_, bool with_weight)
      : weight_size(with_weight ? 9 * outputs * channels_ : 0),
        channels(channels_),
        grad_weight(groups * weight_size),
        sums(groups * 2 * channels) {}

  A* weight(int64_t group) const { return grad_weight.get() + group * weight_size; }
  A* sum_grad(int64_t group) const { return sums.get() + group * 2 * channels; }
  A* sum_grad_x(int64_t group) const { return sum_grad(group) + channels; }
};

// One thread's tiles.
template <typename T, typename A>
struct Workspace {
  int64_t pixels;  // of the tile without its halo, rounded up to whole products
  int64_t transposed_stride;
  Scratch<T> out_grad;    // padded, [padded pixels, padded outputs]
  Scratch<T> transposed;  // [outputs, padded pixels]
  Scratch<A> products;    // [pixels, channels of a chunk]
  Scratch<T> activations, paired;
  Prefetch prefetch;

  Workspace(const ImageTiles& tiles, int64_t outputs, int64_t padded_outputs, int64_t widest)
      : pixels(round_up(tiles.most_rows() * tiles.pitch(), 2)),
        transposed_stride(round_up(tiles.padded_pixels(), 16) + 16),
        out_grad(round_up(tiles.padded_pixels(), 16) * padded_outputs),
        transposed(outputs * transposed_stride),
        products(pixels * widest),
        activations(pixels * widest),
        paired(kPairedRows<T> ? kDepth * widest : 0) {}
};

template <typename S, typename T>
class Backward {
  using A = Accumulate<S>;

 public:
  explicit Backward(const Conv3x3Backward& arguments)
      : p_(arguments),
        tiles_(p_.images, p_.height, p_.width),
        groups_(std::min(kMostGroups, tiles_.tiles())),
        weight_(static_cast<const A*>(p_.weight), p_.outputs, p_.channels),
        partials_(groups_, p_.outputs, p_.channels, p_.grad_weight != nullptr) {}

  void run() {
    parallel_tasks(groups_, [&](TaskRun& run) {
      Workspace<T, A> workspace(tiles_, p_.outputs, weight_.padded_outputs(), weight_.chunk(0).channels);
      for (int64_t group; run.next(group);) run_group(group, workspace);
      release_gemm<T>();
    });
    reduce();
  }

 private:
  void run_group(int64_t group, Workspace<T, A>& workspace) {
    std::fill_n(partials_.sum_grad(group), 2 * p_.channels, A(0));
    const int64_t first = tiles_.tiles() * group / groups_, last = tiles_.tiles() * (group + 1) / groups_;
    for (int64_t tile = first; tile < last; tile++) {
      load_out_grad(tile, workspace);
      for (int64_t index = 0; index < weight_.chunks(); index++) {
        if (p_.sum_grad) multiply_input_gradient(tile, index, workspace);
        deposit(group, tile, weight_.chunk(index), workspace);
        if (p_.grad_weight) add_weight_gradient(group, tile, weight_.chunk(index), tile > first, workspace);
      }
    }
  }

  // The gradient of the tile's outputs with its halo, padded with zeros, and its transpose.
  void load_out_grad(int64_t tile, Workspace<T, A>& to) {
    const int64_t stride = weight_.padded_outputs(), width = tiles_.width();
    const int64_t padded = round_up(tiles_.padded_pixels(), 16);
    T* rows_out = to.out_grad.get();
    std::fill_n(rows_out, padded * stride, T(0));
    for (int64_t row = -1; row <= tiles_.rows(tile); row++) {
      const int64_t pixel = tiles_.first_pixel(tile, row);
      if (pixel < 0) continue;
      const S* from = static_cast<const S*>(p_.out_grad) + pixel * p_.out_grad_stride;
      T* padded_row = rows_out + tiles_.padded_pixel(row) * stride;
      for (int64_t x = 0; x < width; x++) {
        for (int64_t c = 0; c < p_.outputs; c += kLanes<A>) {
          const int64_t count = p_.outputs - c;
          store(padded_row + x * stride + c, load<A>(from + x * p_.out_grad_stride + c, count), count);
        }
      }
    }
    if (p_.grad_weight) transpose(rows_out, stride, padded, p_.outputs, to.transposed.get(), to.transposed_stride);
  }

  void multiply_input_gradient(int64_t tile, int64_t index, Workspace<T, A>& workspace) {
    const ChannelChunk chunk = weight_.chunk(index);
    const int64_t stride = weight_.padded_outputs(), pitch = tiles_.pitch();
    const int64_t pixel = tiles_.first_pixel(tile, 0), pixels = tiles_.pixels(tile);
    const auto *x = static_cast<const S*>(p_.x), *grad = static_cast<const S*>(p_.grad);
    workspace.prefetch.add(x + pixel * p_.x_stride + chunk.first, p_.x_stride, pixels, chunk.channels);
    workspace.prefetch.add(grad ? grad + pixel * p_.grad_stride + chunk.first : nullptr, p_.grad_stride, pixels,
                           chunk.channels);
    const int64_t step = tiles_.rows_of_a_product(tile);
    for (int64_t vertical = 0; vertical < 3; vertical++) {
      for (int64_t row = 0; row < tiles_.rows(tile); row += step) {
        multiply(step * pitch - 1, chunk.channels, 3 * stride,
                 static_cast<const T*>(workspace.out_grad.get() + (row + vertical) * pitch * stride), stride,
                 static_cast<const T*>(weight_.taps(index, vertical)), chunk.channels,
                 workspace.products.get() + row * pitch * chunk.channels, chunk.channels, vertical > 0,
                 workspace.prefetch);
      }
    }
  }

  // Recomputes the activations of a chunk (padding is zero), masks the gradient by them, takes its sums and leaves
  // scale times it in ``grad``.
  void deposit(int64_t group, int64_t tile, const ChannelChunk& chunk, Workspace<T, A>& workspace) {
    const int64_t rows = tiles_.rows(tile), pitch = tiles_.pitch(), width = tiles_.width(), channels = chunk.channels;
    for (int64_t row = 0; row < rows; row++) {
      T* activations = workspace.activations.get() + row * pitch * channels;
      const int64_t pixel = tiles_.first_pixel(tile, row);
      if (pixel < 0) {
        std::fill_n(activations, pitch * channels, T(0));
        continue;
      }
      std::fill_n(activations + width * channels, channels, T(0));
      for (int64_t c = 0; c < channels; c += kLanes<A>) {
        deposit_lanes(group, pixel, chunk.first + c, channels - c,
                      workspace.products.get() + row * pitch * channels + c, activations + c, channels);
      }
    }
  }

  // One row of pixels, as many channels as a vector has lanes.
  void deposit_lanes(int64_t group, int64_t pixel, int64_t channel, int64_t count, const A* products, T* activations,
                     int64_t stride) {
    const S* x = static_cast<const S*>(p_.x) + pixel * p_.x_stride + channel;
    const Vector<A> scale = load<A>(static_cast<const A*>(p_.scale) + channel, count);
    const Vector<A> shift = load<A>(static_cast<const A*>(p_.shift) + channel, count);
    if (!p_.sum_grad) {
      for (int64_t i = 0; i < tiles_.width(); i++) {
        store(activations + i * stride, activate(load<A>(x + i * p_.x_stride, count), scale, shift), count);
      }
      return;
    }
    const Vector<A> mean = load<A>(static_cast<const A*>(p_.mean) + channel, count);
    A *sums = partials_.sum_grad(group) + channel, *sums_x = partials_.sum_grad_x(group) + channel;
    S* grad = p_.grad ? static_cast<S*>(p_.grad) + pixel * p_.grad_stride + channel : nullptr;
    Vector<A> sum{}, sum_x{};
    for (int64_t i = 0; i < tiles_.width(); i++) {
      const Vector<A> value = load<A>(x + i * p_.x_stride, count);
      const Vector<A> activation = activate(value, scale, shift);
      store(activations + i * stride, activation, count);
      const Vector<A> masked = relu_mask(activation, load<A>(products + i * stride, count));
      sum += masked;
      sum_x += masked * (value - mean);
      if (!grad) continue;
      S* to = grad + i * p_.grad_stride;
      const Vector<A> before = p_.accumulate ? load<A>(static_cast<const S*>(to), count) : Vector<A>{};
      store(to, before + masked * scale, count);
    }
    store(sums, load<A>(static_cast<const A*>(sums), count) + sum, count);
    store(sums_x, load<A>(static_cast<const A*>(sums_x), count) + sum_x, count);
  }

  // dweight[tap] += (shifted out_grad)^T @ activations. Only the gradient has a halo: the tap shifts it, so that the
  // activations, which are wider, are shared by all nine products.
  void add_weight_gradient(int64_t group, int64_t tile, const ChannelChunk& chunk, bool accumulate,
                           Workspace<T, A>& workspace) {
    const int64_t pitch = tiles_.pitch(), channels = chunk.channels, pixels = tiles_.rows(tile) * pitch;
    if (kPairedRows<T> && pixels % 2) std::fill_n(workspace.activations.get() + pixels * channels, channels, T(0));
    for (int64_t first = 0; first < pixels; first += kDepth) {
      const int64_t depth = ChannelChunks<T>::even(std::min(kDepth, pixels - first));
      const T* right = workspace.activations.get() + first * channels;
      if constexpr (kPairedRows<T>) {
        pack_gathered(depth, channels, workspace.paired.get(), [&](int64_t row) { return right + row * channels; });
        right = workspace.paired.get();
      }
      for (int64_t tap = 0; tap < 9; tap++) {
        const int64_t shift = pitch + 1 - (tap / 3 - 1) * pitch - (tap % 3 - 1);
        multiply(p_.outputs, channels, depth, static_cast<const T*>(workspace.transposed.get() + first + shift),
                 workspace.transposed_stride, right, channels,
                 partials_.weight(group) + tap * p_.outputs * p_.channels + chunk.first, p_.channels,
                 accumulate || first > 0, workspace.prefetch);
      }
    }
  }

  // Adds the groups' partial results in their order.
  void reduce() {
    if (p_.grad_weight) {
      at::parallel_for(0, p_.outputs, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> taps(9 * p_.channels);
        for (int64_t output = begin; output < end; output++) reduce_weight(output, taps.get());
      });
    }
    if (p_.sum_grad) {
      for (int64_t c = 0; c < p_.channels; c++) {
        double sum = 0, sum_x = 0;
        for (int64_t group = 0; group < groups_; group++) {
          sum += partials_.sum_grad(group)[c];
          sum_x += partials_.sum_grad_x(group)[c];
        }
        static_cast<A*>(p_.sum_grad)[c] = static_cast<A>(sum);
        static_cast<A*>(p_.sum_grad_x)[c] = static_cast<A>(sum_x);
      }
    }
  }

  void reduce_weight(int64_t output, A* taps) {
    for (int64_t tap = 0; tap < 9; tap++) {
      for (int64_t c = 0; c < p_.channels; c += kLanes<A>) {
        const int64_t count = p_.channels - c;
        Vector<A> total{};
        for (int64_t group = 0; group < groups_; group++) {
          const A* partial = partials_.weight(group) + (tap * p_.outputs + output) * p_.channels + c;
          total += load<A>(partial, count);
        }
        store(taps + tap * p_.channels + c, total, count);
      }
    }
    taps_last(taps, p_.channels, p_.channels, static_cast<A*>(p_.grad_weight) + output * p_.channels * 9);
  }

  const Conv3x3Backward& p_;
  ImageTiles tiles_;
  int64_t groups_;
  BackwardWeight<T> weight_;
  Partials<A> partials_;
};

}  // namespace

void bn_relu_conv3x3_backward(const Conv3x3Backward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() { Backward<S, T>(arguments).run(); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
