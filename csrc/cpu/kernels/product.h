// What a matrix product on tiles in cache is made of.
#pragma once

#include <cstdint>

namespace densenet_efficient::CPU_CAPABILITY {

// C [rows, columns] (+)= the sum over segments of A [rows, depth] @ B [depth, columns]; layouts as in gemm.h. A segment
// follows the one before it at a distance of ``a_segment`` and ``b_segment`` elements.
template <typename T, typename A>
struct Product {
  int64_t rows, columns, depth;
  const T* a;
  int64_t a_stride;
  const T* b;
  int64_t b_stride;
  A* c;
  int64_t c_stride;
  bool accumulate = false;
  int64_t segments = 1, a_segment = 0, b_segment = 0;

  // The same without the first ``count`` rows, columns or steps of the depth (both even where B comes in pairs).
  Product after_rows(int64_t count) const {
    Product rest = *this;
    rest.rows -= count;
    rest.a += count * a_stride;
    rest.c += count * c_stride;
    return rest;
  }
  Product after_columns(int64_t count) const {
    Product rest = *this;
    rest.columns -= count;
    rest.b += count * (sizeof(T) == 2 ? 2 : 1);
    rest.c += count;
    return rest;
  }
  Product after_depth(int64_t count) const {
    Product rest = *this;
    rest.depth -= count;
    rest.a += count;
    rest.b += count * b_stride;
    rest.accumulate = true;
    return rest;
  }
  Product first(int64_t rows_, int64_t columns_, int64_t depth_) const {
    Product part = *this;
    part.rows = rows_;
    part.columns = columns_;
    part.depth = depth_;
    return part;
  }
};

}  // namespace densenet_efficient::CPU_CAPABILITY
