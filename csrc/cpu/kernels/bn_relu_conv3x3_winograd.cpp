#include "cpu/kernels/bn_relu_conv3x3_winograd.h"

#include "cpu/kernels/conv3x3_weight.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/statistics.h"
#include "cpu/kernels/tasks.h"
#include "cpu/kernels/winograd.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

template <typename S, typename T>
void forward(const Conv3x3Forward& p) {
  const auto* x = static_cast<const S*>(p.x);
  const auto *scale = static_cast<const float*>(p.scale), *shift = static_cast<const float*>(p.shift);
  auto* const out = static_cast<S*>(p.out);
  const BlockTiles tiles(p.images, p.height, p.width);
  const ChannelChunks<T> chunks(p.channels);
  const Scratch<T> transformed_here(p.packed ? 0 : TransformedWeight<T>::size(p.outputs, p.channels));
  if (!p.packed) {
    TransformedWeight<T>(transformed_here.get(), p.outputs, p.channels)
        .transform_forward(static_cast<const float*>(p.weight), p.channels_last);
  }
  auto* const packed = static_cast<T*>(const_cast<void*>(p.packed));
  const TransformedWeight<T> weight(p.packed ? packed : transformed_here.get(), p.outputs, p.channels);
  TileStatistics<float> statistics(p.mean ? tiles.tiles() : 0, p.outputs);

  parallel_tasks(tiles.tiles(), [&](TaskRun& run) {
    const Transformed<T> patches(tiles.most_blocks(), chunks.chunk(0).channels);
    const Transformed<float> products(tiles.most_blocks(), p.outputs);
    const Scratch<float> compact(p.mean ? tiles.most_pixels() * p.outputs : 0);
    Prefetch prefetch;
    const Multiplying<T> multiplying;
    prefetch.add_bytes(p.next, 0, p.next_bytes);
    for (int64_t tile; run.next(tile);) {
      for (int64_t index = 0; index < chunks.chunks(); index++) {
        const ChannelChunk chunk = chunks.chunk(index);
        transform_tile(tiles, tile, x + chunk.first, p.x_stride, chunk.channels,
                       ActivationOf{scale + chunk.first, shift + chunk.first}, patches);
        const bool last = index + 1 == chunks.chunks();
        ask_ahead(tiles, last ? tile + 1 : tile, x + chunks.chunk(last ? 0 : index + 1).first, p.x_stride,
                  chunk.channels, prefetch);
        for (int element = 0; element < kElements; element++) {
          multiply(Product<T, float>{.rows = tiles.blocks(tile),
                                     .columns = p.outputs,
                                     .depth = chunk.padded,
                                     .a = patches.at(element),
                                     .a_stride = patches.stride(),
                                     .b = weight.at(element) + chunk.first * p.outputs,
                                     .b_stride = p.outputs,
                                     .c = products.at(element),
                                     .c_stride = products.stride(),
                                     .accumulate = index > 0},
                   prefetch);
        }
      }
      const int64_t pixel = tiles.first_pixel(tiles.first_row(tile)), pixels = tiles.pixels(tile);
      S* to = out + pixel * p.out_stride;
      write_tile(tiles, tile, products, p.outputs, to, p.out_stride);
      if (!p.mean) continue;
      load_rows(to, p.out_stride, pixels, p.outputs, compact.get(), p.outputs);
      statistics.take(tile, static_cast<const float*>(compact.get()), p.outputs, pixels);
    }
  });
  if (p.mean) statistics.merge(static_cast<float*>(p.mean), static_cast<float*>(p.variance));
}

template <typename Function>
void dispatch_transformed(c10::ScalarType dtype, Function function) {
  dispatch_product(dtype, [&]<typename S, typename T>() {
    if constexpr (kLeastTransformed<T> < kNever) function.template operator()<S, T>();
  });
}

}  // namespace

int64_t transformed_conv3x3_bytes(c10::ScalarType dtype, int64_t channels, int64_t outputs) {
  int64_t bytes = 0;
  dispatch_transformed(dtype, [&]<typename S, typename T>() {
    bytes = TransformedWeight<T>::size(outputs, channels) * sizeof(T) + Scratch<T>::kSlack;
  });
  return bytes;
}

void transform_conv3x3(c10::ScalarType dtype, const void* weight, int64_t channels, int64_t outputs,
                       void* transformed) {
  dispatch_transformed(dtype, [&]<typename S, typename T>() {
    TransformedWeight<T>(static_cast<T*>(transformed), outputs, channels)
        .transform_forward(static_cast<const float*>(weight), false);
  });
}

void bn_relu_conv3x3_winograd(const Conv3x3Forward& arguments) {
  dispatch_transformed(arguments.dtype, [&]<typename S, typename T>() { forward<S, T>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
