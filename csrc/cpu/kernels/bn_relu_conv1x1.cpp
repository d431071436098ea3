#include "cpu/kernels/bn_relu_conv1x1.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/multiply_activations.h"
#include "cpu/kernels/statistics.h"
#include "cpu/kernels/tasks.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

// Tiles are multiples of the micro-kernel's rows.
template <typename T>
constexpr int64_t kMicroRows = kProductRows<T> > 1 ? kProductRows<T> : 6;
template <typename T>
constexpr int64_t kMostRows = kProductRows<T> > 1 ? 64 : 72;  // of a tile
constexpr int64_t kDepth = 512;  // channels per product: the activations of a tile stay in the second-level cache

// A thread asks for its weight from this byte on: for what comes first, the operation before has asked.
constexpr int64_t kAskedFor = 1 << 17;

// The rows of a tile when ``rows`` are cut into an even number of tiles, about equal; few tiles are cut exactly.
template <typename T>
int64_t rows_of_a_tile(int64_t rows) {
  constexpr int64_t few = 8;
  const int64_t tiles = round_up(ceil_div(std::max<int64_t>(rows, 1), kMostRows<T>), 2);
  const int64_t share = std::max<int64_t>(1, ceil_div(rows, tiles));
  return tiles <= few ? share : round_up(share, kMicroRows<T>);
}

// weight^T [channels, outputs] as the right operand of products, strip of outputs by strip.
template <typename T>
struct PackedWeight {
  int64_t channels, outputs;

  int64_t size() const { return round_up(channels, 2) * outputs; }
  // The outputs of the strip that begins with this one.
  int64_t columns(int64_t output) const { return std::min(kStripColumns<T>, outputs - output); }
  // The place of a strip's channel.
  int64_t offset(int64_t output, int64_t channel) const {
    return output * round_up(channels, 2) + channel * columns(output);
  }
};

template <typename T, typename A>
void pack_weight(const A* weight, int64_t channels, int64_t outputs, T* packed) {
  const PackedWeight<T> layout{channels, outputs};
  constexpr int64_t block = 32;
  at::parallel_for(0, ceil_div(channels, block), 4, [&](int64_t begin, int64_t end) {
    const Scratch<A> transposed(kPairedRows<T> ? block * outputs : 0);
    for (int64_t index = begin; index < end; index++) {
      const int64_t first = index * block, count = std::min(block, channels - first);
      for (int64_t n = 0; n < outputs; n += layout.columns(n)) {
        const int64_t columns = layout.columns(n);
        const A* from = weight + n * channels + first;
        T* to = packed + layout.offset(n, first);
        if constexpr (kPairedRows<T>) {
          transpose(from, channels, columns, count, transposed.get(), columns);
          pack_gathered(count, columns, to, [&](int64_t row) { return transposed.get() + row * columns; });
        } else {
          transpose(from, channels, columns, count, to, columns);
        }
      }
    }
  });
}

template <typename S, typename T>
void forward(const Conv1x1Forward& p) {
  using A = Accumulate<S>;
  const auto* x = static_cast<const S*>(p.x);
  const auto *scale = static_cast<const A*>(p.scale), *shift = static_cast<const A*>(p.shift);
  auto* out = static_cast<S*>(p.out);
  const int64_t outputs = p.outputs;
  const int64_t tile_rows = rows_of_a_tile<T>(p.rows), tiles = ceil_div(p.rows, tile_rows);
  const PackedWeight<T> layout{p.channels, outputs};
  const Scratch<T> packed_here(p.packed ? 0 : layout.size());
  if (!p.packed) pack_weight(static_cast<const A*>(p.weight), p.channels, outputs, packed_here.get());
  const T* weight = p.packed ? static_cast<const T*>(p.packed) : packed_here.get();
  TileStatistics<A> statistics(p.mean ? tiles : 0, outputs);
  const bool skips = skips_zeros<T>(x, p.x_stride, scale, shift, p.rows, p.channels, outputs);

  parallel_tasks(tiles, [&](TaskRun& run) {
    const int64_t stride = row_stride<T>(std::min(p.channels, kDepth));
    const int64_t most_rows = round_up(tile_rows, kProductRows<T>);
    Scratch<T> activations(most_rows * stride);
    Scratch<A> products(std::is_same_v<S, A> ? 0 : most_rows * outputs);
    Prefetch prefetch;
    const Multiplying<T> multiplying;
    prefetch.add_bytes(p.packed, kAskedFor, layout.size() * sizeof(T));
    prefetch.add_bytes(p.next, 0, p.next_bytes);
    for (int64_t tile; run.next(tile);) {
      const int64_t row = tile * tile_rows, rows = std::min(tile_rows, p.rows - row);
      S* tile_out = out + row * p.out_stride;
      A* sums = products.get();
      int64_t sums_stride = outputs;
      if constexpr (std::is_same_v<S, A>) {
        sums = tile_out;
        sums_stride = p.out_stride;
      }
      for (int64_t c = 0; c < p.channels; c += kDepth) {
        const int64_t depth = std::min(kDepth, p.channels - c);
        activate_rows(x + row * p.x_stride + c, p.x_stride, scale + c, shift + c, rows, depth, activations.get(),
                      stride, kPairedRows<T> ? round_up(depth, 2) : depth);
        const bool last = c + depth == p.channels;
        const int64_t next_row = last ? row + tile_rows : row, next_channel = last ? 0 : c + depth;
        prefetch.add(x + next_row * p.x_stride + next_channel, p.x_stride, std::min(tile_rows, p.rows - next_row),
                     std::min(kDepth, p.channels - next_channel));
        if constexpr (kSkips<T>) {
          if (skips) {
            multiply_skipping(ActivationProduct{.rows = rows,
                                                .columns = outputs,
                                                .depth = depth,
                                                .a = activations.get(),
                                                .a_row = stride,
                                                .a_step = 1,
                                                .b = weight + layout.offset(0, c),
                                                .b_stride = layout.columns(0),
                                                .b_strip = layout.offset(layout.columns(0), 0),
                                                .c = sums,
                                                .c_stride = sums_stride,
                                                .accumulate = c > 0},
                              prefetch);
            continue;
          }
        }
        for (int64_t n = 0; n < outputs; n += layout.columns(n)) {
          multiply(Product<T, A>{.rows = std::is_same_v<S, A> ? rows : round_up(rows, kProductRows<T>),
                                 .columns = layout.columns(n),
                                 .depth = depth,
                                 .a = activations.get(),
                                 .a_stride = stride,
                                 .b = weight + layout.offset(n, c),
                                 .b_stride = layout.columns(n),
                                 .c = sums + n,
                                 .c_stride = sums_stride,
                                 .accumulate = c > 0},
                   prefetch);
        }
      }
      if constexpr (!std::is_same_v<S, A>) store_rows(sums, outputs, rows, outputs, tile_out, p.out_stride);
      if (p.mean) statistics.take(tile, tile_out, p.out_stride, rows);
    }
  });
  if (p.mean) statistics.merge(static_cast<A*>(p.mean), static_cast<A*>(p.variance));
}

}  // namespace

int64_t conv1x1_packed_bytes(c10::ScalarType dtype, int64_t channels, int64_t outputs) {
  int64_t bytes = 0;
  dispatch_product(dtype, [&]<typename S, typename T>() {
    bytes = PackedWeight<T>{channels, outputs}.size() * sizeof(T) + Scratch<T>::kSlack;
  });
  return bytes;
}

void pack_conv1x1(c10::ScalarType dtype, const void* weight, int64_t channels, int64_t outputs, void* packed) {
  dispatch_product(dtype, [&]<typename S, typename T>() {
    pack_weight(static_cast<const Accumulate<S>*>(weight), channels, outputs, static_cast<T*>(packed));
  });
}

void bn_relu_conv1x1(const Conv1x1Forward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() { forward<S, T>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
