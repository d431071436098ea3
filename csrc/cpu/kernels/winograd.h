// A 3x3 convolution as sixteen matrix products: F(2x2, 3x3) of Lavin and Gray 2016 (arXiv:1509.09308), which multiplies
// 16 times for a block of 2x2 outputs where the sum over nine taps multiplies 36 times.
//
// With the patches d [4, 4] of the input around each block and the taps w [3, 3] the outputs are
//   y = A^T ((G w G^T) * (B^T d B)) A,   B^T = | 1  0 -1  0 |   G = |  1    0    0  |   A^T = | 1  1  1  0 |
//                                              | 0  1  1  0 |       | 1/2  1/2  1/2 |         | 0  1 -1 -1 |
//                                              | 0 -1  1  0 |       | 1/2 -1/2  1/2 |
//                                              | 0  1  0 -1 |       |  0    0    1  |
// where the product in the middle is one of matrices [blocks, channels] and [channels, outputs] for each of the sixteen
// elements. The gradient of the input is the same convolution of the outputs' gradient, with the taps flipped; that of
// the taps is G^T ((A dy A^T)^T (B^T d B)) G, its product summed over the blocks.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "cpu/kernels/prefetch.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {

constexpr int kElements = 16;  // of a transformed patch, block or weight

// From how many channels on a convolution of operands T is transformed. Products of float64 are for those who want
// every digit, and in AMX's tiles those of 16-bit operands are no longer what takes the time. Rounding the transformed
// operands to bfloat16 costs about one storing in bfloat16 more, which sums over few channels would not even out.
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
template <typename T>
constexpr int64_t kLeastTransformed = kNever;
template <>
constexpr int64_t kLeastTransformed<float> = 0;
#if defined(CPU_CAPABILITY_AVX512_BF16) && !defined(CPU_CAPABILITY_AMX)
template <>
constexpr int64_t kLeastTransformed<BFloat16> = 32;
#endif

// Images cut into rows of blocks, each two rows of pixels, and these into tiles: the pixels of a tile follow each other
// in memory. The cut depends on the shape alone, so that sums have one order for any number of threads.
class BlockTiles {
 public:
  BlockTiles(int64_t images, int64_t height, int64_t width)
      : height_(height),
        width_(width),
        rows_per_image_(ceil_div(height, 2)),
        blocks_per_row_(ceil_div(width, 2)),
        rows_(images * rows_per_image_) {
    constexpr int64_t wanted_blocks = 56, tiles_multiple = 4;  // so that few tiles are shared out evenly
    const int64_t rows_of_a_tile = std::max<int64_t>(1, wanted_blocks / std::max<int64_t>(1, blocks_per_row_));
    tiles_ = std::min(rows_, round_up(ceil_div(rows_, rows_of_a_tile), tiles_multiple));
  }

  int64_t tiles() const { return tiles_; }
  int64_t width() const { return width_; }
  int64_t blocks_per_row() const { return blocks_per_row_; }
  int64_t most_blocks() const { return tiles_ == 0 ? 0 : ceil_div(rows_, tiles_) * blocks_per_row_; }
  int64_t most_pixels() const { return 4 * most_blocks(); }

  // The rows of blocks of a tile are first_row(tile) to first_row(tile + 1) - 1, counted over all images.
  int64_t first_row(int64_t tile) const { return rows_ * tile / tiles_; }
  int64_t blocks(int64_t tile) const { return (first_row(tile + 1) - first_row(tile)) * blocks_per_row_; }

  // The first pixel (row of the matrix) of a row of blocks, and how many rows of pixels it has: the last one of an
  // image of odd height has one.
  int64_t first_pixel(int64_t row) const { return (row / rows_per_image_ * height_ + y_of(row)) * width_; }
  int64_t height_of(int64_t row) const { return std::min<int64_t>(2, height_ - y_of(row)); }
  int64_t pixels(int64_t tile) const { return first_pixel(first_row(tile + 1)) - first_pixel(first_row(tile)); }

  // Whether row ``offset`` (-1 to 2) of the patches of a row of blocks lies in the image.
  bool is_inside(int64_t row, int64_t offset) const {
    const int64_t y = y_of(row) + offset;
    return y >= 0 && y < height_;
  }

 private:
  int64_t y_of(int64_t row) const { return row % rows_per_image_ * 2; }

  int64_t height_, width_, rows_per_image_, blocks_per_row_, rows_, tiles_;
};

// Sixteen matrices [blocks, channels], one per element.
template <typename T>
class Transformed {
 public:
  // In memory of their own, or in that of others which are at least as large.
  Transformed(int64_t blocks, int64_t channels, void* memory = nullptr)
      : stride_(round_up(channels, 16)),
        distance_(blocks * stride_ + 16),  // never a multiple of a page, which would crowd a few sets of the cache
        own_(memory ? 0 : kElements * distance_),
        data_(memory ? static_cast<T*>(memory) : own_.get()) {}

  int64_t stride() const { return stride_; }
  int64_t distance() const { return distance_; }
  T* at(int64_t element, int64_t block = 0) const { return data_ + element * distance_ + block * stride_; }

  // One vector of channels, from c on, of a block.
  ALWAYS_INLINE void put(int64_t element, int64_t block, int64_t c, Vector<float> value) const {
    store(at(element, block) + c, value);
  }

 private:
  int64_t stride_, distance_;
  Scratch<T> own_;
  T* data_;
};

// The same as right operands of products over the blocks, in pairs where T asks for them; blocks come in their order.
template <typename T>
struct RightOperands {
  const Transformed<T>& to;

  ALWAYS_INLINE void put(int64_t element, int64_t block, int64_t c, Vector<float> value) const {
    if constexpr (kPairedRows<T>) {
      store_in_pair(to.at(element, block & ~int64_t{1}) + 2 * c, block & 1, value);
    } else {
      to.put(element, block, c, value);
    }
  }
};

namespace winograd {

using Vec = Vector<float>;
constexpr int64_t kVector = kLanes<float>;

// ---- one dimension of each transformation

struct Four {
  Vec value[4];
};

ALWAYS_INLINE Four patch(Vec a, Vec b, Vec c, Vec d) { return {{a - c, b + c, c - b, b - d}}; }  // B^T
ALWAYS_INLINE std::array<Vec, 2> outputs(const Four& m) {                                        // A^T
  return {m.value[0] + m.value[1] + m.value[2], m.value[1] - m.value[2] - m.value[3]};
}
ALWAYS_INLINE Four gradient(Vec a, Vec b) { return {{a, a + b, a - b, -b}}; }  // A
ALWAYS_INLINE Four taps(Vec a, Vec b, Vec c) {                                 // G
  const Vec outer = 0.5f * (a + c), inner = 0.5f * b;
  return {{a, outer + inner, outer - inner, c}};
}
ALWAYS_INLINE std::array<Vec, 3> taps_gradient(const Four& m) {  // G^T
  const Vec sum = 0.5f * (m.value[1] + m.value[2]), difference = 0.5f * (m.value[1] - m.value[2]);
  return {m.value[0] + sum, difference, sum + m.value[3]};
}

// ---- vectors of channels, all blocks of a row

// put(element, block, value) receives B^T d B of every patch; pixel(row, column) is a vector of its inputs, zero
// outside the image.
template <typename Pixel, typename Put>
ALWAYS_INLINE void transform_patches(int64_t blocks, const Pixel& pixel, const Put& put) {
  const auto column_of = [&](int64_t x) { return patch(pixel(0, x), pixel(1, x), pixel(2, x), pixel(3, x)); };
  Four first = column_of(-1), second = column_of(0);
  for (int64_t block = 0; block < blocks; block++) {
    const Four third = column_of(2 * block + 1), fourth = column_of(2 * block + 2);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const Four row = patch(first.value[i], second.value[i], third.value[i], fourth.value[i]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) put(4 * i + j, block, row.value[j]);
    }
    first = third;
    second = fourth;
  }
}

// pixel(row, column) receives A^T m A of every block.
template <typename Pixel>
ALWAYS_INLINE void transform_products(int64_t blocks, const float* from, int64_t stride, int64_t distance,
                                      const Pixel& pixel) {
  for (int64_t block = 0; block < blocks; block++, from += stride) {
    Four upper, lower;
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      Four column;
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) column.value[i] = load<float>(from + (4 * i + j) * distance);
      const auto both = outputs(column);
      upper.value[j] = both[0];
      lower.value[j] = both[1];
    }
    const auto above = outputs(upper), below = outputs(lower);
    for (int x = 0; x < 2; x++) {
      pixel(0, 2 * block + x, above[x]);
      pixel(1, 2 * block + x, below[x]);
    }
  }
}

// to = A dy A^T of every block; pixel(row, column) as above.
template <typename T, typename Pixel>
ALWAYS_INLINE void transform_gradients(int64_t blocks, const Pixel& pixel, T* to, int64_t stride, int64_t distance) {
  for (int64_t block = 0; block < blocks; block++, to += stride) {
    const Four left = gradient(pixel(0, 2 * block), pixel(1, 2 * block));
    const Four right = gradient(pixel(0, 2 * block + 1), pixel(1, 2 * block + 1));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const Four row = gradient(left.value[i], right.value[i]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) store(to + (4 * i + j) * distance, row.value[j]);
    }
  }
}

// to[element] = G w G^T [columns], for nine rows of taps w [columns].
template <typename RowOf>
ALWAYS_INLINE void transform_taps(int64_t columns, const RowOf& row_of, float* to, int64_t distance) {
  for (int64_t c = 0; c < columns; c += kVector) {
    const int64_t count = columns - c;
    Four vertical[3];
#pragma GCC unroll 3
    for (int kx = 0; kx < 3; kx++) {
      vertical[kx] = taps(load<float>(row_of(kx) + c, count), load<float>(row_of(3 + kx) + c, count),
                          load<float>(row_of(6 + kx) + c, count));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const Four row = taps(vertical[0].value[i], vertical[1].value[i], vertical[2].value[i]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) store(to + (4 * i + j) * distance + c, row.value[j], count);
    }
  }
}

// to[tap] [columns] = G^T m G, for the vectors m of sixteen elements.
template <typename ElementAt>
ALWAYS_INLINE void transform_taps_gradient(int64_t columns, const ElementAt& element_at, float* to) {
  for (int64_t c = 0; c < columns; c += kVector) {
    const int64_t count = columns - c;
    std::array<Vec, 3> vertical[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      Four column;
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) column.value[i] = element_at(4 * i + j, c, count);
      vertical[j] = taps_gradient(column);
    }
#pragma GCC unroll 3
    for (int ky = 0; ky < 3; ky++) {
      const auto row = taps_gradient({{vertical[0][ky], vertical[1][ky], vertical[2][ky], vertical[3][ky]}});
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; kx++) store(to + (3 * ky + kx) * columns + c, row[kx], count);
    }
  }
}

}  // namespace winograd

// The patches of a tile, mapped and transformed: map_of(c, count) gives what is done to ``count`` channels from c on.
// ``to`` is Transformed or its RightOperands.
template <typename S, typename MapOf, typename Matrices>
void transform_tile(const BlockTiles& tiles, int64_t tile, const S* x, int64_t x_stride, int64_t channels,
                    const MapOf& map_of, const Matrices& to) {
  using winograd::Vec;
  const int64_t width = tiles.width(), first = tiles.first_row(tile);
  for (int64_t row = first; row < tiles.first_row(tile + 1); row++) {
    const S* upper = x + tiles.first_pixel(row) * x_stride;
    std::array<const S*, 4> rows;
    for (int i = 0; i < 4; i++) rows[i] = tiles.is_inside(row, i - 1) ? upper + (i - 1) * width * x_stride : nullptr;
    const int64_t first_block = (row - first) * tiles.blocks_per_row();
    for (int64_t c = 0; c < channels; c += winograd::kVector) {
      const auto map = map_of(c, channels - c);
      const auto run = [&](auto load_lanes) ALWAYS_INLINE_LAMBDA {
        winograd::transform_patches(
            tiles.blocks_per_row(),
            [&](int i, int64_t column) ALWAYS_INLINE_LAMBDA {
              if (rows[i] == nullptr || column < 0 || column >= width) return Vec{};
              return map(load_lanes(rows[i] + column * x_stride + c));
            },
            [&](int element, int64_t block, Vec value)
                ALWAYS_INLINE_LAMBDA { to.put(element, first_block + block, c, value); });
      };
      if (channels - c >= winograd::kVector) {
        run([](const S* from) ALWAYS_INLINE_LAMBDA { return load<float>(from); });
      } else {
        run([&](const S* from) ALWAYS_INLINE_LAMBDA { return load<float>(from, channels - c); });
      }
    }
  }
}

// The outputs of a tile from their transformed products: row_at(row of blocks, 0 or 1) is where a row of pixels goes.
template <typename S>
void write_tile(const BlockTiles& tiles, int64_t tile, const Transformed<float>& from, int64_t channels, S* to,
                int64_t to_stride) {
  using winograd::Vec;
  const int64_t width = tiles.width(), first = tiles.first_row(tile), start = tiles.first_pixel(first);
  for (int64_t row = first; row < tiles.first_row(tile + 1); row++) {
    S* upper = to + (tiles.first_pixel(row) - start) * to_stride;
    const int64_t height = tiles.height_of(row), block = (row - first) * tiles.blocks_per_row();
    for (int64_t c = 0; c < channels; c += winograd::kVector) {
      winograd::transform_products(tiles.blocks_per_row(), from.at(0, block) + c, from.stride(), from.distance(),
                                   [&](int64_t y, int64_t x, Vec value) ALWAYS_INLINE_LAMBDA {
                                     if (y >= height || x >= width) return;
                                     store(upper + (y * width + x) * to_stride + c, value, channels - c);
                                   });
    }
  }
}

// relu(x * scale + shift), as transform_tile takes it.
struct ActivationOf {
  const float *scale, *shift;

  auto operator()(int64_t c, int64_t count) const {
    const winograd::Vec a = load<float>(scale + c, count), b = load<float>(shift + c, count);
    return [a, b](winograd::Vec x) ALWAYS_INLINE_LAMBDA { return activate(x, a, b); };
  }
};

// Nothing, as transform_tile takes it.
struct Unchanged {
  auto operator()(int64_t, int64_t) const {
    return [](winograd::Vec x) ALWAYS_INLINE_LAMBDA { return x; };
  }
};

// Asks for the pixels of a tile, if there is such a tile.
template <typename S>
void ask_ahead(const BlockTiles& tiles, int64_t tile, const S* x, int64_t stride, int64_t channels,
               Prefetch& prefetch) {
  if (tile >= tiles.tiles()) return;
  prefetch.add(x + tiles.first_pixel(tiles.first_row(tile)) * stride, stride, tiles.pixels(tile), channels);
}

}  // namespace densenet_efficient::CPU_CAPABILITY
