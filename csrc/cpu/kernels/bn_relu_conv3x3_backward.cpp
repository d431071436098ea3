#include <ATen/Parallel.h>

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/bn_relu_conv3x3.h"
#include "cpu/kernels/bn_relu_conv3x3_winograd.h"
#include "cpu/kernels/conv3x3_weight.h"
#include "cpu/kernels/deposit.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/image_tiles.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/tasks.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kMostGroups = 32;  // of tiles; each group has partial sums of its own
constexpr int64_t kColumns = 32;     // channels per product of the weight's gradient

// Pixels per product of the weight's gradient: all of a tile, mostly, for sums are costly to take up again.
constexpr int64_t kDepth = 1024;

// What the groups leave: the weight's gradient as [9, outputs, channels], and the sums.
template <typename A>
struct Partials {
  int64_t weight_size;
  Scratch<A> grad_weight;
  PartialSums<A> sums;

  Partials(int64_t groups, int64_t outputs, int64_t channels, bool with_weight)
      : weight_size(with_weight ? 9 * outputs * channels : 0),
        grad_weight(groups * weight_size),
        sums(groups, channels) {}

  A* weight(int64_t group) const { return grad_weight.get() + group * weight_size; }
};

// One thread's tiles.
template <typename T, typename A>
struct Workspace {
  int64_t pixels;         // of the tile without its halo, rounded up to whole products
  int64_t padded_pixels;  // of the tile with its halo, and what products that are rounded up read beyond
  int64_t channels;       // of a chunk, in whole vectors
  Scratch<T> out_grad;    // padded, [padded pixels, padded outputs]
  Scratch<T> transposed;  // [outputs, padded pixels]
  Scratch<A> products;    // [pixels, channels]
  Scratch<T> activations;
  Prefetch prefetch;

  Workspace(const ImageTiles& tiles, int64_t outputs, int64_t padded_outputs, int64_t widest)
      : pixels(round_up(tiles.most_rows() * tiles.pitch(), std::max(kProductRows<T>, kProductDepth<T>))),
        padded_pixels(round_up(tiles.padded_pixels() + kProductDepth<T>, 16)),
        channels(round_up(widest, 16)),
        out_grad(padded_pixels * padded_outputs),
        transposed(outputs * transposed_stride()),
        products(pixels * channels),
        activations(pixels * channels) {}

  int64_t transposed_stride() const { return padded_pixels + 16; }
};

template <typename S, typename T>
class Backward {
  using A = Accumulate<S>;

 public:
  explicit Backward(const Conv3x3Backward& arguments)
      : p_(arguments),
        tiles_(p_.images, p_.height, p_.width, kPairedRows<T>),
        groups_(std::min(kMostGroups, tiles_.tiles())),
        weight_(static_cast<const A*>(p_.weight), p_.outputs, p_.channels, p_.channels_last),
        partials_(groups_, p_.outputs, p_.channels, p_.grad_weight != nullptr) {}

  void run() {
    parallel_tasks(groups_, [&](TaskRun& run) {
      Workspace<T, A> workspace(tiles_, p_.outputs, weight_.padded_outputs(), weight_.chunk(0).channels);
      const Multiplying<T> multiplying;
      for (int64_t group; run.next(group);) run_group(group, workspace);
    });
    reduce();
  }

 private:
  void run_group(int64_t group, Workspace<T, A>& workspace) {
    partials_.sums.clear(group, 0, p_.channels);
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
    T* rows_out = to.out_grad.get();
    std::fill_n(rows_out, to.padded_pixels * stride, T(0));
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
    if (!p_.grad_weight) return;
    transpose(rows_out, stride, to.padded_pixels, p_.outputs, to.transposed.get(), to.transposed_stride());
  }

  void multiply_input_gradient(int64_t tile, int64_t index, Workspace<T, A>& workspace) {
    const ChannelChunk chunk = weight_.chunk(index);
    const int64_t stride = weight_.padded_outputs(), pitch = tiles_.pitch();
    const int64_t pixel = tiles_.first_pixel(tile, 0), pixels = tiles_.pixels(tile);
    const auto *x = static_cast<const S*>(p_.x), *grad = static_cast<const S*>(p_.grad);
    workspace.prefetch.add(x + pixel * p_.x_stride + chunk.first, p_.x_stride, pixels, chunk.channels);
    workspace.prefetch.add(grad ? grad + pixel * p_.grad_stride + chunk.first : nullptr, p_.grad_stride, pixels,
                           chunk.channels);
    // With AMX all three vertical taps at once, for its sums are costly to take up again; else one after the other, so
    // that the weight of one stays in the first cache.
    const int64_t step = tiles_.rows_of_a_product<T>(tile), segments = kProductRows<T> > 1 ? 3 : 1;
    for (int64_t vertical = 0; vertical < 3; vertical += segments) {
      for (int64_t row = 0; row < tiles_.rows(tile); row += step) {
        multiply(Product<T, A>{.rows = tiles_.product_rows<T>(step),
                               .columns = chunk.channels,
                               .depth = 3 * stride,
                               .a = workspace.out_grad.get() + (row + vertical) * pitch * stride,
                               .a_stride = stride,
                               .b = weight_.taps(index, vertical),
                               .b_stride = chunk.channels,
                               .c = workspace.products.get() + row * pitch * workspace.channels,
                               .c_stride = workspace.channels,
                               .accumulate = vertical > 0,
                               .segments = segments,
                               .a_segment = pitch * stride,
                               .b_segment = 3 * stride * chunk.channels},
                 workspace.prefetch);
      }
    }
  }

  // Recomputes the activations of a chunk (padding is zero), masks the gradient by them, takes its sums and leaves
  // scale times it in ``grad``.
  void deposit(int64_t group, int64_t tile, const ChannelChunk& chunk, Workspace<T, A>& workspace) {
    const int64_t rows = tiles_.rows(tile), pitch = tiles_.pitch(), channels = workspace.channels;
    for (int64_t row = 0; row < rows; row++) {
      T* activations = workspace.activations.get() + row * pitch * channels;
      const int64_t pixel = tiles_.first_pixel(tile, row);
      const int64_t filled = pixel < 0 ? 0 : kPairedRows<T> ? round_up(tiles_.width(), 2) : tiles_.width();
      std::fill_n(activations + filled * channels, (pitch - filled) * channels, T(0));
      if (pixel < 0) continue;
      deposit_row(group, pixel, chunk, workspace.products.get() + row * pitch * channels, activations, channels);
    }
    std::fill_n(workspace.activations.get() + rows * pitch * channels, (workspace.pixels - rows * pitch) * channels,
                T(0));
  }

  // One row of pixels.
  void deposit_row(int64_t group, int64_t pixel, const ChannelChunk& chunk, const A* gradient, T* activations,
                   int64_t stride) const {
    const int64_t c = chunk.first;
    Deposit<S, T>{.rows = tiles_.width(),
                  .columns = chunk.channels,
                  .x = static_cast<const S*>(p_.x) + pixel * p_.x_stride + c,
                  .x_stride = p_.x_stride,
                  .mean = static_cast<const A*>(p_.mean) + c,
                  .scale = static_cast<const A*>(p_.scale) + c,
                  .shift = static_cast<const A*>(p_.shift) + c,
                  .gradient = p_.sum_grad ? gradient : nullptr,
                  .gradient_stride = stride,
                  .grad = p_.grad ? static_cast<S*>(p_.grad) + pixel * p_.grad_stride + c : nullptr,
                  .grad_stride = p_.grad_stride,
                  .accumulate = p_.accumulate,
                  .activations = p_.grad_weight ? activations : nullptr,
                  .activations_stride = stride,
                  .sum_grad = partials_.sums.sum_grad(group) + c,
                  .sum_grad_x = partials_.sums.sum_grad_x(group) + c}
        .run();
  }

  // dweight[tap] += (shifted out_grad)^T @ activations. Only the gradient has a halo: the tap shifts it, so that the
  // activations, which are wider, are shared by all nine products.
  void add_weight_gradient(int64_t group, int64_t tile, const ChannelChunk& chunk, bool accumulate,
                           Workspace<T, A>& workspace) {
    const int64_t pitch = tiles_.pitch(), pixels = round_up(tiles_.rows(tile) * pitch, kProductDepth<T>);
    for (int64_t first = 0; first < pixels; first += kDepth) {
      for (int64_t column = 0; column < chunk.channels; column += kColumns) {
        for (int64_t tap = 0; tap < 9; tap++) {
          const int64_t shift = pitch + 1 - (tap / 3 - 1) * pitch - (tap % 3 - 1);
          const int64_t paired_column = (kPairedRows<T> ? 2 : 1) * column;
          multiply(Product<T, A>{.rows = p_.outputs,
                                 .columns = std::min(kColumns, chunk.channels - column),
                                 .depth = std::min(kDepth, pixels - first),
                                 .a = workspace.transposed.get() + first + shift,
                                 .a_stride = workspace.transposed_stride(),
                                 .b = workspace.activations.get() + first * workspace.channels + paired_column,
                                 .b_stride = workspace.channels,
                                 .c = partials_.weight(group) + tap * p_.outputs * p_.channels + chunk.first + column,
                                 .c_stride = p_.channels,
                                 .accumulate = accumulate || first > 0},
                   workspace.prefetch);
        }
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
    if (p_.sum_grad) partials_.sums.merge(0, p_.channels, p_.sum_grad, p_.sum_grad_x);
  }

  // ``scratch`` [9, channels] where the gradient has its taps last.
  void reduce_weight(int64_t output, A* scratch) {
    A* const to = static_cast<A*>(p_.grad_weight) + output * 9 * p_.channels;
    A* const taps = p_.grad_channels_last ? to : scratch;
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
    if (!p_.grad_channels_last) taps_last(taps, p_.channels, p_.channels, to);
  }

  const Conv3x3Backward& p_;
  ImageTiles tiles_;
  int64_t groups_;
  BackwardWeight<T> weight_;
  Partials<A> partials_;
};

}  // namespace

void bn_relu_conv3x3_backward(const Conv3x3Backward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() {
    if (std::min(arguments.channels, arguments.outputs) >= kLeastTransformed<T>) {
      return bn_relu_conv3x3_backward_winograd(arguments);
    }
    if constexpr (kLeastTransformed<T> > 0) Backward<S, T>(arguments).run();
  });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
