#include "cpu/kernels/write_with_statistics.h"

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/statistics.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kTileRows = 128;  // as in channel_stats, whose bits these are; a block is still in cache when written

// to [pixels, channels] = from, the pixels of one image.
template <typename S>
void write_pixels(const WriteWithStatistics& p, const S* from, int64_t pixels, int64_t channels, S* to) {
  if (p.channel_stride == 1) {
    for (int64_t i = 0; i < pixels; i++) {
      std::memcpy(to + i * p.out_stride, from + i * p.pixel_stride, channels * sizeof(S));
    }
  } else if (p.pixel_stride == 1) {
    transpose(from, p.channel_stride, channels, pixels, to, p.out_stride);
  } else {
    for (int64_t i = 0; i < pixels; i++) {
      for (int64_t c = 0; c < channels; c++) {
        to[i * p.out_stride + c] = from[i * p.pixel_stride + c * p.channel_stride];
      }
    }
  }
}

// The rows and columns of a block, an image at a time.
template <typename S>
void write_block(const WriteWithStatistics& p, const Block& block, S* to) {
  const S* x = static_cast<const S*>(p.x) + block.column * p.channel_stride;
  int64_t image = block.row / p.pixels, pixel = block.row % p.pixels;
  for (int64_t written = 0; written < block.rows; image++, pixel = 0) {
    const int64_t count = std::min(p.pixels - pixel, block.rows - written);
    const S* from = x + image * p.image_stride + pixel * p.pixel_stride;
    write_pixels(p, from, count, block.columns, to + written * p.out_stride);
    written += count;
  }
}

template <typename S>
void write_of(const WriteWithStatistics& p) {
  using A = Accumulate<S>;
  const int64_t rows = p.images * p.pixels;
  TileStatistics<A> statistics(ceil_div(rows, kTileRows), p.channels);
  parallel_blocks(rows, p.channels, kTileRows, [&](const Block& block) {
    S* out = static_cast<S*>(p.out) + block.row * p.out_stride + block.column;
    write_block(p, block, out);
    A* mean = statistics.mean(block.tile) + block.column;
    tile_statistics(out, p.out_stride, block.rows, block.columns, mean, mean + p.channels);
    if (block.column == 0) statistics.set_count(block.tile, block.rows);
  });
  statistics.merge(static_cast<A*>(p.mean), static_cast<A*>(p.variance));
}

}  // namespace

void write_with_statistics(const WriteWithStatistics& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { write_of<S>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
