// Which activations are not zero: a bit for each. NaN is one of them.
#pragma once

#include "cpu/vector.h"

// Float32 is served by these alone, and by the portable path.
#if defined(CPU_CAPABILITY_AVX2) || (defined(CPU_CAPABILITY_AVX512) && !defined(CPU_CAPABILITY_AVX512_BF16))
#define SKIPS_ZEROS
#endif

#if defined(SKIPS_ZEROS)

namespace densenet_efficient::CPU_CAPABILITY {

constexpr int64_t kMaskBits = 64, kMaskedRows = 128;  // at most, of a call

constexpr uint64_t first_bits(int64_t count) { return count < kMaskBits ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

// Of a whole vector.
ALWAYS_INLINE uint64_t nonzero_lanes(const float* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(from), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#else
  return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(from), _mm256_setzero_ps(), _CMP_NEQ_UQ));
#endif
}

// Of the first ``depth`` values of each row, 64 at most; what lies behind them in a vector is read, and does not count.
inline void mask_rows(const float* x, int64_t stride, int64_t rows, int64_t depth, uint64_t* masks) {
  const uint64_t valid = first_bits(depth);
  for (int64_t row = 0; row < rows; row++) {
    uint64_t mask = 0;
    for (int64_t k = 0; k < depth; k += kLanes<float>) mask |= nonzero_lanes(x + row * stride + k) << k;
    masks[row] = mask & valid;
  }
}

// Of the first ``depth`` values of each column; the masks of whole vectors of columns are written.
inline void mask_columns(const float* x, int64_t stride, int64_t columns, int64_t depth, uint64_t* masks) {
  using detail::DoubleWords;
  for (int64_t column = 0; column < columns; column += kLanes<float>) {
    DoubleWords halves[2] = {};
    for (int64_t k = 0; k < depth; k++) {
      const auto differs = detail::bit_cast<DoubleWords>(load<float>(x + k * stride + column) != Vector<float>{});
      halves[k / 32] |= differs & (uint32_t{1} << k % 32);
    }
    for (int64_t i = 0; i < kLanes<float>; i++) masks[column + i] = uint64_t{halves[1][i]} << 32 | halves[0][i];
  }
}

}  // namespace densenet_efficient::CPU_CAPABILITY

#endif
