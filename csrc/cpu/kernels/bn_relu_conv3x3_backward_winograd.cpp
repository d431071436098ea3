#include <ATen/Parallel.h>

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/bn_relu_conv3x3_winograd.h"
#include "cpu/kernels/conv3x3_weight.h"
#include "cpu/kernels/deposit.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/tasks.h"
#include "cpu/kernels/winograd.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

// Tiles whose partial sums are one: few groups, for each one's are written and read again, as large as the weight.
int64_t groups_of(int64_t tiles) {
  constexpr int64_t least = 4, most = 16;
  return std::min(tiles, std::clamp(ceil_div(tiles, 2), least, most));
}

// What the groups leave: the transformed gradient of the weight, [16, outputs, channels], and the sums.
struct Partials {
  int64_t matrix;
  Scratch<float> grad_weight;
  PartialSums<float> sums;

  Partials(int64_t groups, int64_t outputs, int64_t channels, bool with_weight)
      : matrix(outputs * channels + 16),
        grad_weight(with_weight ? groups * kElements * matrix : 0),
        sums(groups, channels) {}

  float* weight(int64_t group, int64_t element) const {
    return grad_weight.get() + (group * kElements + element) * matrix;
  }
};

// One thread's tiles.
template <typename T>
struct Workspace {
  Transformed<T> out_grad;      // of the patches of the outputs' gradient, or of its blocks
  Transformed<float> products;  // that make the inputs' gradient
  Transformed<T> activations;   // the patches of them, thereafter in the same memory
  int64_t transposed;           // blocks of a tile, in whole vectors
  Scratch<T> gradient;          // of the outputs, transposed: [16, outputs, transposed]
  int64_t channels;             // of a chunk, in whole vectors
  Scratch<float> inputs;        // the activations' gradient, [pixels, channels]
  Prefetch prefetch;

  Workspace(const BlockTiles& tiles, int64_t outputs, int64_t widest)
      : out_grad(round_up(tiles.most_blocks(), 16), outputs),
        products(round_up(tiles.most_blocks(), 2), widest),
        activations(round_up(tiles.most_blocks(), 2), widest, products.at(0)),
        transposed(round_up(tiles.most_blocks(), 16) + 16),
        gradient(kElements * outputs * transposed),
        channels(round_up(widest, 16)),
        inputs(tiles.most_pixels() * channels) {}
};

template <typename S, typename T>
class Backward {
 public:
  explicit Backward(const Conv3x3Backward& arguments)
      : p_(arguments),
        tiles_(p_.images, p_.height, p_.width),
        chunks_(p_.channels),
        groups_(groups_of(tiles_.tiles())),
        weight_data_(p_.sum_grad ? TransformedWeight<T>::size(p_.outputs, p_.channels) : 0),
        weight_(weight_data_.get(), p_.outputs, p_.channels),
        partials_(groups_, p_.outputs, p_.channels, p_.grad_weight != nullptr) {
    if (p_.sum_grad) weight_.transform_backward(static_cast<const float*>(p_.weight), p_.channels_last);
  }

  void run() {
    parallel_tasks(groups_, [&](TaskRun& run) {
      Workspace<T> workspace(tiles_, p_.outputs, chunks_.chunk(0).channels);
      const Multiplying<T> multiplying;
      for (int64_t group; run.next(group);) run_group(group, workspace);
    });
    reduce();
  }

 private:
  void run_group(int64_t group, Workspace<T>& workspace) {
    partials_.sums.clear(group, 0, p_.channels);
    const int64_t first = tiles_.tiles() * group / groups_, last = tiles_.tiles() * (group + 1) / groups_;
    for (int64_t tile = first; tile < last; tile++) {
      if (p_.grad_weight) transform_out_grad(tile, workspace);
      if (p_.sum_grad) {
        transform_tile(tiles_, tile, static_cast<const S*>(p_.out_grad), p_.out_grad_stride, p_.outputs, Unchanged{},
                       workspace.out_grad);
      }
      for (int64_t index = 0; index < chunks_.chunks(); index++) {
        const ChannelChunk chunk = chunks_.chunk(index);
        if (p_.sum_grad) {
          multiply_input_gradient(tile, chunk, workspace);
          deposit(group, tile, chunk, workspace);
        }
        if (p_.grad_weight) add_weight_gradient(group, tile, chunk, tile > first, workspace);
      }
    }
  }

  // The gradient of the outputs as the left operands of the weight's gradient.
  void transform_out_grad(int64_t tile, Workspace<T>& workspace) {
    const int64_t width = tiles_.width(), first = tiles_.first_row(tile);
    const Transformed<T>& blocks = workspace.out_grad;
    for (int64_t row = first; row < tiles_.first_row(tile + 1); row++) {
      const S* upper = static_cast<const S*>(p_.out_grad) + tiles_.first_pixel(row) * p_.out_grad_stride;
      const int64_t height = tiles_.height_of(row), block = (row - first) * tiles_.blocks_per_row();
      for (int64_t c = 0; c < p_.outputs; c += winograd::kVector) {
        winograd::transform_gradients(
            tiles_.blocks_per_row(),
            [&](int64_t y, int64_t x) ALWAYS_INLINE_LAMBDA {
              if (y >= height || x >= width) return winograd::Vec{};
              return load<float>(upper + (y * width + x) * p_.out_grad_stride + c, p_.outputs - c);
            },
            blocks.at(0, block) + c, blocks.stride(), blocks.distance());
      }
    }
    const int64_t count = tiles_.blocks(tile);
    for (int element = 0; element < kElements; element++) {
      // The last pair's other block, by which the zeros of the activations' are multiplied.
      if (kPairedRows<T> && count % 2 == 1) std::fill_n(blocks.at(element, count), blocks.stride(), T(0));
      transpose(blocks.at(element), blocks.stride(), round_up(count, 16), p_.outputs,
                workspace.gradient.get() + element * p_.outputs * workspace.transposed, workspace.transposed);
    }
  }

  void multiply_input_gradient(int64_t tile, const ChannelChunk& chunk, Workspace<T>& workspace) {
    const auto *x = static_cast<const S*>(p_.x), *grad = static_cast<const S*>(p_.grad);
    ask_ahead(tiles_, tile, x + chunk.first, p_.x_stride, chunk.channels, workspace.prefetch);
    if (grad) ask_ahead(tiles_, tile, grad + chunk.first, p_.grad_stride, chunk.channels, workspace.prefetch);
    for (int element = 0; element < kElements; element++) {
      multiply(Product<T, float>{.rows = tiles_.blocks(tile),
                                 .columns = chunk.channels,
                                 .depth = p_.outputs,
                                 .a = workspace.out_grad.at(element),
                                 .a_stride = workspace.out_grad.stride(),
                                 .b = weight_.at(element) + kInPairs * chunk.first,
                                 .b_stride = p_.channels,
                                 .c = workspace.products.at(element),
                                 .c_stride = workspace.products.stride()},
               workspace.prefetch);
    }
    write_tile(tiles_, tile, workspace.products, chunk.channels, workspace.inputs.get(), workspace.channels);
  }

  // Masks the gradient by the recomputed activations, takes its sums and leaves scale times it in ``grad``.
  void deposit(int64_t group, int64_t tile, const ChannelChunk& chunk, const Workspace<T>& workspace) const {
    const int64_t c = chunk.first, pixel = tiles_.first_pixel(tiles_.first_row(tile));
    Deposit<S, T>{.rows = tiles_.pixels(tile),
                  .columns = chunk.channels,
                  .x = static_cast<const S*>(p_.x) + pixel * p_.x_stride + c,
                  .x_stride = p_.x_stride,
                  .mean = static_cast<const float*>(p_.mean) + c,
                  .scale = static_cast<const float*>(p_.scale) + c,
                  .shift = static_cast<const float*>(p_.shift) + c,
                  .gradient = workspace.inputs.get(),
                  .gradient_stride = workspace.channels,
                  .grad = p_.grad ? static_cast<S*>(p_.grad) + pixel * p_.grad_stride + c : nullptr,
                  .grad_stride = p_.grad_stride,
                  .accumulate = p_.accumulate,
                  .activations = nullptr,
                  .activations_stride = 0,
                  .sum_grad = partials_.sums.sum_grad(group) + c,
                  .sum_grad_x = partials_.sums.sum_grad_x(group) + c}
        .run();
  }

  void add_weight_gradient(int64_t group, int64_t tile, const ChannelChunk& chunk, bool accumulate,
                           Workspace<T>& workspace) {
    const ActivationOf activation{static_cast<const float*>(p_.scale) + chunk.first,
                                  static_cast<const float*>(p_.shift) + chunk.first};
    transform_tile(tiles_, tile, static_cast<const S*>(p_.x) + chunk.first, p_.x_stride, chunk.channels, activation,
                   RightOperands<T>{workspace.activations});
    for (int element = 0; element < kElements; element++) {
      multiply(Product<T, float>{.rows = p_.outputs,
                                 .columns = chunk.channels,
                                 .depth = tiles_.blocks(tile),
                                 .a = workspace.gradient.get() + element * p_.outputs * workspace.transposed,
                                 .a_stride = workspace.transposed,
                                 .b = workspace.activations.at(element),
                                 .b_stride = workspace.activations.stride(),
                                 .c = partials_.weight(group, element) + chunk.first,
                                 .c_stride = p_.channels,
                                 .accumulate = accumulate},
               workspace.prefetch);
    }
  }

  // Adds the groups' partial results in their order.
  void reduce() {
    if (p_.grad_weight) {
      at::parallel_for(0, p_.outputs, 1, [&](int64_t begin, int64_t end) {
        const Scratch<float> taps(9 * p_.channels);
        for (int64_t output = begin; output < end; output++) reduce_weight(output, taps.get());
      });
    }
    if (p_.sum_grad) partials_.sums.merge(0, p_.channels, p_.sum_grad, p_.sum_grad_x);
  }

  // ``scratch`` [9, channels] where the gradient has its taps last.
  void reduce_weight(int64_t output, float* scratch) {
    float* const to = static_cast<float*>(p_.grad_weight) + output * 9 * p_.channels;
    float* const taps = p_.grad_channels_last ? to : scratch;
    winograd::transform_taps_gradient(
        p_.channels,
        [&](int element, int64_t c, int64_t count) {
          winograd::Vec total{};
          for (int64_t group = 0; group < groups_; group++) {
            total += load<float>(partials_.weight(group, element) + output * p_.channels + c, count);
          }
          return total;
        },
        taps);
    if (!p_.grad_channels_last) taps_last(taps, p_.channels, p_.channels, to);
  }

  static constexpr int64_t kInPairs = kPairedRows<T> ? 2 : 1;

  const Conv3x3Backward& p_;
  BlockTiles tiles_;
  ChannelChunks<T> chunks_;
  int64_t groups_;
  Scratch<T> weight_data_;
  TransformedWeight<T> weight_;
  Partials partials_;
};

}  // namespace

void bn_relu_conv3x3_backward_winograd(const Conv3x3Backward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() {
    if constexpr (kLeastTransformed<T> < kNever) Backward<S, T>(arguments).run();
  });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
