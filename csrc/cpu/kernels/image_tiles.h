// How images are cut into tiles for a 3x3 convolution, and how a tile lies in its padded scratch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/multiply.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {

// A tile is a few rows of one image, or a few whole small images with a zero row between two of them. In the scratch
// its rows have a pitch of width + 1, or more to make it even: zero pixels at the end of a row pad it and the next one.
// A tile of R rows takes (R + 2) * pitch + 2 pixels there: the halo row above comes first, after one more zero pixel.
//
// The cut depends on the shape alone, so that sums have one order for any number of threads.
class ImageTiles {
 public:
  ImageTiles(int64_t images, int64_t height, int64_t width, bool even_pitch = false)
      : images_(images), height_(height), width_(width), pitch_(even_pitch ? round_up(width + 1, 2) : width + 1) {
    constexpr int64_t wanted_pixels = 400, wanted_tiles = 4, least_rows = 3;
    const int64_t whole = (height + 1) * pitch_;
    if (images > 1 && whole <= wanted_pixels) {
      stack(std::clamp<int64_t>(images / wanted_tiles, 1, wanted_pixels / whole));
    } else {
      int64_t parts = (whole + wanted_pixels / 2) / wanted_pixels;
      if (images * parts < wanted_tiles) parts = std::min(wanted_tiles, height / least_rows);
      tiles_per_image_ = std::clamp<int64_t>(parts, 1, std::max<int64_t>(height, 1));
      tiles_ = images * tiles_per_image_;
    }
  }

  int64_t tiles() const { return tiles_; }
  int64_t width() const { return width_; }
  int64_t pitch() const { return pitch_; }

  // The most rows that any tile has, zero rows between images included.
  int64_t most_rows() const {
    return stacked() ? images_per_tile_ * (height_ + 1) - 1 : ceil_div(height_, tiles_per_image_);
  }

  int64_t rows(int64_t tile) const {
    if (stacked()) return std::min(images_per_tile_, images_ - tile * images_per_tile_) * (height_ + 1) - 1;
    return first_row(tile % tiles_per_image_ + 1) - first_row(tile % tiles_per_image_);
  }

  // How many of a tile's rows one product takes: one where its pixels fill the micro-kernel's blocks, so that padding
  // is not multiplied, else all.
  template <typename T>
  int64_t rows_of_a_product(int64_t tile) const {
    return kProductRows<T> == 1 && fills_blocks(width_) ? 1 : rows(tile);
  }

  // The pixels of a product that takes ``rows`` rows: of a single one without its padding.
  template <typename T>
  int64_t product_rows(int64_t rows) const {
    return round_up(rows == 1 ? width_ : rows * pitch_ - 1, kProductRows<T>);
  }

  // The number of a tile's pixels that belong to images.
  int64_t pixels(int64_t tile) const {
    if (stacked()) return std::min(images_per_tile_, images_ - tile * images_per_tile_) * height_ * width_;
    return rows(tile) * width_;
  }

  // The first pixel (row of the matrix) of row ``row`` of a tile, -1 <= row <= rows(tile); -1 for a row of zeros.
  int64_t first_pixel(int64_t tile, int64_t row) const {
    if (stacked()) {
      const int64_t image = tile * images_per_tile_ + (row < 0 ? 0 : row / (height_ + 1));
      const int64_t y = row < 0 ? -1 : row % (height_ + 1);
      return y < 0 || y == height_ ? -1 : (image * height_ + y) * width_;
    }
    const int64_t y = first_row(tile % tiles_per_image_) + row;
    return y < 0 || y >= height_ ? -1 : (tile / tiles_per_image_ * height_ + y) * width_;
  }

  // Pixels of the scratch that holds any tile with its halo.
  int64_t padded_pixels() const { return (most_rows() + 2) * pitch_ + 2; }

  // Where pixel 0 of row ``row`` (-1 is the halo above) lies in the scratch.
  int64_t padded_pixel(int64_t row) const { return (row + 1) * pitch_ + 1; }

 private:
  bool stacked() const { return images_per_tile_ > 0; }

  // Takes at most ``most`` whole images per tile: about as many in each, and an even number of tiles.
  void stack(int64_t most) {
    tiles_ = ceil_div(images_, most);
    if (tiles_ % 2 == 1 && tiles_ < images_) tiles_++;
    images_per_tile_ = ceil_div(images_, tiles_);
    tiles_ = ceil_div(images_, images_per_tile_);
  }

  // The image's row with which its part ``part`` begins; the parts differ by one row at most.
  int64_t first_row(int64_t part) const { return height_ * part / tiles_per_image_; }

  int64_t images_, height_, width_, pitch_;
  int64_t tiles_ = 0;
  int64_t images_per_tile_ = 0;  // of stacked images, else 0
  int64_t tiles_per_image_ = 1;  // of tiles within an image
};

}  // namespace densenet_efficient::CPU_CAPABILITY
