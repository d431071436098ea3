// Products of activations. A ReLU leaves about half of them zero: what is multiplied by zero is skipped, and so is the
// gradient of what is zero.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/multiply.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Whether there are products that skip zeros: none of bfloat16, of which pairs are multiplied, of double, and for CPUs
// with fewer registers.
#if defined(CPU_CAPABILITY_AVX512)
template <typename T>
constexpr bool kSkips = std::is_same_v<T, float>;
#else
template <typename T>
constexpr bool kSkips = false;
#endif

// What they take: columns that are whole registers, and not too few for what each zero costs to find.
inline bool may_skip(int64_t columns) { return columns % kLanes<float> == 0 && columns >= 6 * kLanes<float>; }

// Those of whose gradients some are left out: no more than registers hold of a row.
inline bool may_mask(int64_t columns) { return may_skip(columns) && columns <= 12 * kLanes<float>; }

// C [rows, columns] (+)= A [rows, depth] @ B [depth, columns]; A has activations, and one of its two strides is 1. At
// most 128 rows; columns that may_skip().
struct ActivationProduct {
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  bool accumulate;
  bool is_finite = true;  // B; where it is not, its products with zeros are NaN
};

// C [rows, columns] = A [rows, depth] @ B^T [columns, depth] where an activation is not zero, else zero; C has 64
// columns, of which those from ``columns`` on receive anything. A depth that may_mask().
struct ActivationGradient {
  int64_t rows, columns, depth;
  const float* activations;
  int64_t activations_stride;
  const float* a;
  int64_t a_stride;
  const float* b;
  float* c;
  int64_t c_stride;
};

// Both ask for the lines of ``prefetch`` meanwhile. The sums of the first are added in the order of those that skip
// nothing: to the same bits.
void multiply_skipping(const ActivationProduct& p, Prefetch& prefetch);
void multiply_skipping(const ActivationGradient& p, Prefetch& prefetch);

// ``p`` with activations on its left.
template <typename T, typename A>
void multiply_activations(const Product<T, A>& p, Prefetch& prefetch) {
  if constexpr (kSkips<T>) {
    multiply_skipping(ActivationProduct{.rows = p.rows,
                                        .columns = p.columns,
                                        .depth = p.depth,
                                        .a = p.a,
                                        .a_row = p.a_stride,
                                        .a_step = 1,
                                        .b = p.b,
                                        .b_stride = p.b_stride,
                                        .c = p.c,
                                        .c_stride = p.c_stride,
                                        .accumulate = p.accumulate},
                      prefetch);
  }
}

// Whether products of relu(x * scale + shift) with ``columns`` columns are to skip zeros: where a sample of the rows
// has enough of them.
template <typename T, typename S, typename A>
bool skips_zeros(const S* x, int64_t x_stride, const A* scale, const A* shift, int64_t rows, int64_t channels,
                 int64_t columns) {
  if constexpr (kSkips<T>) {
    constexpr int64_t most_rows = 8;
    if (rows == 0 || !may_skip(columns)) return false;
    const int64_t sampled = std::min(rows, most_rows);
    int64_t nonzero = 0;
    for (int64_t i = 0; i < sampled; i++) {
      const S* row = x + i * rows / sampled * x_stride;
      for (int64_t c = 0; c < channels; c++) nonzero += row[c] * scale[c] + shift[c] > 0;
    }
    return nonzero * 3 <= sampled * channels * 2;  // with more of them skipping takes as long
  }
  return false;
}

}  // namespace densenet_efficient::CPU_CAPABILITY
