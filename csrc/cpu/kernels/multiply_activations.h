// Products of activations. A ReLU leaves about half of them zero: what is multiplied by zero is skipped.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/multiply.h"
#include "cpu/kernels/nonzero.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Whether there are products that skip zeros: none of bfloat16, of which pairs are multiplied, and of double.
#if defined(SKIPS_ZEROS)
template <typename T>
constexpr bool kSkips = std::is_same_v<T, float>;
#else
template <typename T>
constexpr bool kSkips = false;
#endif

// They take columns by so many, a register of AVX-512 and a strip of AVX2, and no fewer than make up for finding zeros.
constexpr int64_t kSkippingColumns = 16;
inline bool may_skip(int64_t columns) { return columns % kSkippingColumns == 0 && columns >= 96; }

// C [rows, columns] (+)= A [rows, depth] @ B [depth, columns]; A has activations, and one of its two strides is 1. At
// most 128 rows; columns that may_skip(). Where B is cut into strips (kStripColumns), they lie ``b_strip`` apart.
struct ActivationProduct {
  int64_t rows, columns, depth;
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_stride, b_strip;
  float* c;
  int64_t c_stride;
  bool accumulate;
  bool is_finite = true;  // B; where it is not, its products with zeros are NaN
};

// Asks for the lines of ``prefetch`` meanwhile. The sums are added in the order of those that skip nothing: to the same
// bits.
void multiply_skipping(const ActivationProduct& p, Prefetch& prefetch);

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
