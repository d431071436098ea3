// How a matrix is split among blocks and threads. A thread owns 16 bytes of columns; a block is lanes_y rows of lanes_x
// such pieces, and goes through a tile of rows. All of it follows from the shape and the dtype alone, not from the card
// or the alignment, so that what is summed over rows has the same bits everywhere.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/dispatch.cuh"

namespace densenet_efficient::cuda {

constexpr int kThreads = 256;
constexpr int kMostLanesX = 8;         // 128 bytes of a row
constexpr int64_t kMostBlocks = 1024;  // where the blocks leave partial sums: enough to fill a large card once

template <typename S>
constexpr int kWidth = 16 / sizeof(S);  // columns of a thread

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

struct Tiling {
  int64_t rows, columns;
  int64_t tile_rows, tiles;
  int64_t spans;  // pieces of a row that are one block wide
  int lanes_x, lanes_y;

  int64_t blocks() const { return tiles * spans; }

  // Tiles of ``step`` rows per thread, or of a multiple where that would make more than ``most_blocks`` blocks.
  static Tiling of(int64_t rows, int64_t columns, int64_t element_size, int step, int64_t most_blocks = kMostBlocks) {
    Tiling t{};
    t.rows = rows;
    t.columns = columns;
    const int64_t pieces = ceil_div(columns * element_size, 16);
    t.lanes_x = 1;
    while (t.lanes_x < kMostLanesX && t.lanes_x < pieces) t.lanes_x *= 2;
    t.lanes_y = kThreads / t.lanes_x;
    t.spans = ceil_div(pieces, t.lanes_x);
    const int64_t least_rows = t.lanes_y * step;
    const int64_t most_tiles = std::max<int64_t>(1, most_blocks / std::max<int64_t>(1, t.spans));
    t.tile_rows = std::max<int64_t>(1, ceil_div(ceil_div(rows, most_tiles), least_rows)) * least_rows;
    t.tiles = ceil_div(rows, t.tile_rows);
    return t;
  }
};

// What a thread works on. A thread beyond the last column has no columns and no rows.
struct Place {
  int lane_x, lane_y;
  int64_t tile;
  int64_t column;
  int columns;
  int64_t row, end;  // its first row, and the end of the tile

  template <typename S>
  static __device__ Place of(const Tiling& t) {
    Place place;
    place.lane_x = static_cast<int>(threadIdx.x) % t.lanes_x;
    place.lane_y = static_cast<int>(threadIdx.x) / t.lanes_x;
    place.tile = blockIdx.x / t.spans;
    place.column = (blockIdx.x % t.spans * t.lanes_x + place.lane_x) * kWidth<S>;
    const int64_t left = t.columns - place.column;
    place.columns = static_cast<int>(left < 0 ? 0 : left < kWidth<S> ? left : kWidth<S>);
    place.row = place.tile * t.tile_rows + place.lane_y;
    const int64_t end = (place.tile + 1) * t.tile_rows;
    place.end = place.columns == 0 ? 0 : end < t.rows ? end : t.rows;
    return place;
  }
};

// The columns of a thread in one row of a matrix: one access of 16 bytes where kAligned, else element by element.
template <typename S, bool kAligned>
struct alignas(16) Columns {
  S values[kWidth<S>];

  __device__ void load(const S* from, int count) {
    if constexpr (kAligned) {
      *this = *reinterpret_cast<const Columns*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth<S>; j++) values[j] = j < count ? from[j] : static_cast<S>(0.0f);
    }
  }

  __device__ void store(S* to, int count) const {
    if constexpr (kAligned) {
      *reinterpret_cast<Columns*>(to) = *this;
    } else {
#pragma unroll
      for (int j = 0; j < kWidth<S>; j++) {
        if (j < count) to[j] = values[j];
      }
    }
  }

  __device__ Accumulate<S> operator[](int j) const { return static_cast<Accumulate<S>>(values[j]); }
};

// The elements of a vector that belong to a thread's columns.
template <typename A, int kCount>
struct Coefficients {
  A values[kCount];

  __device__ Coefficients(const void* vector, const Place& place) {
    const A* from = static_cast<const A*>(vector) + place.column;
#pragma unroll
    for (int j = 0; j < kCount; j++) values[j] = j < place.columns ? from[j] : A(0);
  }

  __device__ A operator[](int j) const { return values[j]; }
};

template <typename S>
using CoefficientsOf = Coefficients<Accumulate<S>, kWidth<S>>;

}  // namespace densenet_efficient::cuda
