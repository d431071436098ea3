#include "cpu/kernels/bn_relu_conv3x3.h"

#include "cpu/kernels/bn_relu_conv3x3_winograd.h"
#include "cpu/kernels/conv3x3_weight.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/image_tiles.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/statistics.h"
#include "cpu/kernels/tasks.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

// The activations of a tile and its halo, a chunk of channels wide; the padding is zero.
template <typename S, typename T, typename A>
void activate_tile(const Conv3x3Forward& p, const ImageTiles& tiles, int64_t tile, const ChannelChunk& chunk,
                   T* padded) {
  const auto* x = static_cast<const S*>(p.x) + chunk.first;
  const auto *scale = static_cast<const A*>(p.scale) + chunk.first,
             *shift = static_cast<const A*>(p.shift) + chunk.first;
  const int64_t stride = chunk.padded, width = tiles.width();
  std::fill_n(padded, stride, T(0));
  for (int64_t row = -1; row <= tiles.rows(tile); row++) {
    T* to = padded + tiles.padded_pixel(row) * stride;
    const int64_t pixel = tiles.first_pixel(tile, row);
    if (pixel < 0) {
      std::fill_n(to, width * stride, T(0));
    } else {
      activate_rows(x + pixel * p.x_stride, p.x_stride, scale, shift, width, chunk.channels, to, stride, stride);
    }
    std::fill_n(to + width * stride, stride, T(0));
  }
}

template <typename S>
void ask_ahead(const Conv3x3Forward& p, const ImageTiles& tiles, int64_t tile, const ChannelChunk& chunk,
               Prefetch& prefetch) {
  if (tile >= tiles.tiles()) return;
  const auto* x = static_cast<const S*>(p.x) + tiles.first_pixel(tile, 0) * p.x_stride + chunk.first;
  prefetch.add(x, p.x_stride, tiles.pixels(tile), chunk.channels);
}

template <typename S, typename T>
void forward(const Conv3x3Forward& p) {
  using A = Accumulate<S>;
  const ImageTiles tiles(p.images, p.height, p.width);
  const Scratch<T> packed_here(p.packed ? 0 : ForwardWeight<T>::packed_size(p.outputs, p.channels));
  if (!p.packed) {
    ForwardWeight<T>::pack(static_cast<const A*>(p.weight), p.outputs, p.channels, p.channels_last, packed_here.get());
  }
  const ForwardWeight<T> weight(p.packed ? static_cast<const T*>(p.packed) : packed_here.get(), p.outputs, p.channels);
  TileStatistics<A> statistics(p.mean ? tiles.tiles() : 0, p.outputs);

  parallel_tasks(tiles.tiles(), [&](TaskRun& run) {
    const int64_t pitch = tiles.pitch(), pixels = round_up(tiles.most_rows() * pitch, kProductRows<T>);
    Scratch<T> padded((tiles.padded_pixels() + kProductRows<T>)*weight.chunk(0).padded);
    Scratch<A> products(pixels * p.outputs), compact(p.mean ? pixels * p.outputs : 0);
    Prefetch prefetch;
    const Multiplying<T> multiplying;
    prefetch.add_bytes(p.next, 0, p.next_bytes);
    for (int64_t tile; run.next(tile);) {
      const int64_t rows = tiles.rows(tile), step = tiles.rows_of_a_product<T>(tile);
      for (int64_t index = 0; index < weight.chunks(); index++) {
        const ChannelChunk chunk = weight.chunk(index);
        activate_tile<S, T, A>(p, tiles, tile, chunk, padded.get());
        const bool last = index + 1 == weight.chunks();
        ask_ahead<S>(p, tiles, last ? tile + 1 : tile, weight.chunk(last ? 0 : index + 1), prefetch);
        for (int64_t ky = 0; ky < 3; ky++) {
          // Three horizontal neighbours are contiguous in the scratch: one product takes all three taps.
          for (int64_t row = 0; row < rows; row += step) {
            multiply(Product<T, A>{.rows = tiles.product_rows<T>(step),
                                   .columns = p.outputs,
                                   .depth = 3 * chunk.padded,
                                   .a = padded.get() + (row + ky) * pitch * chunk.padded,
                                   .a_stride = chunk.padded,
                                   .b = weight.taps(index, ky),
                                   .b_stride = p.outputs,
                                   .c = products.get() + row * pitch * p.outputs,
                                   .c_stride = p.outputs,
                                   .accumulate = index + ky > 0},
                     prefetch);
          }
        }
      }
      int64_t pixel_count = 0;
      for (int64_t row = 0; row < rows; row++) {
        const int64_t pixel = tiles.first_pixel(tile, row);
        if (pixel < 0) continue;
        S* to = static_cast<S*>(p.out) + pixel * p.out_stride;
        store_rows(products.get() + row * pitch * p.outputs, p.outputs, tiles.width(), p.outputs, to, p.out_stride);
        if (p.mean)
          load_rows(to, p.out_stride, tiles.width(), p.outputs, compact.get() + pixel_count * p.outputs, p.outputs);
        pixel_count += tiles.width();
      }
      if (p.mean) statistics.take(tile, static_cast<const A*>(compact.get()), p.outputs, pixel_count);
    }
  });
  if (p.mean) statistics.merge(static_cast<A*>(p.mean), static_cast<A*>(p.variance));
}

// Calls transformed() where a convolution of so many channels is, and direct.template operator()<S, T>() where it is
// not.
template <typename Transformed, typename Direct>
void dispatch_convolution(c10::ScalarType dtype, int64_t channels, Transformed transformed, Direct direct) {
  dispatch_product(dtype, [&]<typename S, typename T>() {
    if (channels >= kLeastTransformed<T>) return transformed();
    if constexpr (kLeastTransformed<T> > 0) direct.template operator()<S, T>();
  });
}

}  // namespace

int64_t conv3x3_packed_bytes(c10::ScalarType dtype, int64_t channels, int64_t outputs) {
  int64_t bytes = 0;
  dispatch_convolution(
      dtype, channels, [&] { bytes = transformed_conv3x3_bytes(dtype, channels, outputs); },
      [&]<typename S, typename T>() {
        bytes = ForwardWeight<T>::packed_size(outputs, channels) * sizeof(T) + Scratch<T>::kSlack;
      });
  return bytes;
}

void pack_conv3x3(c10::ScalarType dtype, const void* weight, int64_t channels, int64_t outputs, void* packed) {
  dispatch_convolution(
      dtype, channels, [&] { transform_conv3x3(dtype, weight, channels, outputs, packed); },
      [&]<typename S, typename T>() {
        const auto* values = static_cast<const Accumulate<S>*>(weight);
        ForwardWeight<T>::pack(values, outputs, channels, false, static_cast<T*>(packed));
      });
}

void bn_relu_conv3x3(const Conv3x3Forward& arguments) {
  dispatch_convolution(
      arguments.dtype, arguments.channels, [&] { bn_relu_conv3x3_winograd(arguments); },
      [&]<typename S, typename T>() { forward<S, T>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
