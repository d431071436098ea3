// The micro-kernel of AMX: sums in four tiles of 16x16, beside two tiles of A and two of B.
#pragma once

#include "cpu/kernels/multiply_vectors.h"

#if defined(CPU_CAPABILITY_AMX)

namespace densenet_efficient::CPU_CAPABILITY::detail {

constexpr int64_t kTileRows = 16, kTileColumns = 16, kTileDepth = 32;  // of the tiles of A, B and the sums

// All eight tiles whole. What does not fill them is left to AVX-512, so that the shape of tiles never changes. It is a
// constant: compilers know of its first eight bytes alone that they are read, and may not write the others.
inline void configure_tiles() {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static constexpr Configuration configuration;
  _tile_loadconfig(&configuration);
}

// Tiles multiply so fast that a product has few places to ask at: fewer lines at each would not be all that come next.
ALWAYS_INLINE void ask_ahead(Prefetch& prefetch) {
  constexpr int lines = 8;
  for (int line = 0; line < lines; line += 2) prefetch.next();
}

// R x V tiles of sums, each 1 or 2. The numbers of the tiles must be constants: 2 * r + v are the sums, 4 + r those of
// A, 6 + v those of B.
template <int R, int V>
ALWAYS_INLINE void multiply_tiles(const Product<BFloat16, float>& p, Prefetch& prefetch) {
  const int64_t a_stride = 2 * p.a_stride, b_stride = 4 * p.b_stride, c_stride = 4 * p.c_stride;
  float *const c = p.c, *const c_below = p.c + kTileRows * p.c_stride;
  if (p.accumulate) {
    _tile_loadd(0, c, c_stride);
    if constexpr (V > 1) _tile_loadd(1, c + kTileColumns, c_stride);
    if constexpr (R > 1) _tile_loadd(2, c_below, c_stride);
    if constexpr (R > 1 && V > 1) _tile_loadd(3, c_below + kTileColumns, c_stride);
  } else {
    _tile_zero(0);
    if constexpr (V > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && V > 1) _tile_zero(3);
  }
  for (int64_t segment = 0; segment < p.segments; segment++) {
    const auto *a = p.a + segment * p.a_segment, *b = p.b + segment * p.b_segment;
    for (int64_t k = 0; k < p.depth; k += kTileDepth) {
      _tile_loadd(4, a + k, a_stride);
      _tile_loadd(6, b + k * p.b_stride, b_stride);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (V > 1) {
        _tile_loadd(7, b + k * p.b_stride + 2 * kTileColumns, b_stride);
        _tile_dpbf16ps(1, 4, 7);
      }
      ask_ahead(prefetch);
      if constexpr (R > 1) {
        _tile_loadd(5, a + kTileRows * p.a_stride + k, a_stride);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (V > 1) _tile_dpbf16ps(3, 5, 7);
        ask_ahead(prefetch);
      }
    }
  }
  _tile_stored(0, c, c_stride);
  if constexpr (V > 1) _tile_stored(1, c + kTileColumns, c_stride);
  if constexpr (R > 1) _tile_stored(2, c_below, c_stride);
  if constexpr (R > 1 && V > 1) _tile_stored(3, c_below + kTileColumns, c_stride);
}

// Whole tiles only.
inline void multiply_whole_tiles(const Product<BFloat16, float>& p, Prefetch& prefetch) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler what they read
  for (int64_t row = 0; row < p.rows; row += 2 * kTileRows) {
    const bool two_rows = row + kTileRows < p.rows;
    for (int64_t column = 0; column < p.columns; column += 2 * kTileColumns) {
      const bool two_columns = column + kTileColumns < p.columns;
      const auto block = p.after_rows(row).after_columns(column);
      if (two_rows && two_columns) {
        multiply_tiles<2, 2>(block, prefetch);
      } else if (two_rows) {
        multiply_tiles<2, 1>(block, prefetch);
      } else if (two_columns) {
        multiply_tiles<1, 2>(block, prefetch);
      } else {
        multiply_tiles<1, 1>(block, prefetch);
      }
    }
  }
}

inline void multiply_with_tiles(const Product<BFloat16, float>& p, Prefetch& prefetch) {
  const int64_t rows = p.rows / kTileRows * kTileRows, columns = p.columns / kTileColumns * kTileColumns,
                depth = p.depth / kTileDepth * kTileDepth;
  if (rows == 0 || columns == 0 || depth == 0) return multiply<BFloat16Step>(p, prefetch);
  multiply_whole_tiles(p.first(rows, columns, depth), prefetch);
  if (depth < p.depth) multiply<BFloat16Step>(p.first(rows, columns, p.depth).after_depth(depth), prefetch);
  if (columns < p.columns) multiply<BFloat16Step>(p.first(rows, p.columns, p.depth).after_columns(columns), prefetch);
  if (rows < p.rows) multiply<BFloat16Step>(p.after_rows(rows), prefetch);
}

}  // namespace densenet_efficient::CPU_CAPABILITY::detail

#endif
