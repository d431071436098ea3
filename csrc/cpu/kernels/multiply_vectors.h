// The micro-kernel of AVX2 and AVX-512: sums in registers, one load of B for several rows of A.
#pragma once

#include "cpu/kernels/prefetch.h"
#include "cpu/kernels/product.h"
#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Whether blocks of seven or fourteen rows leave no rest: so it is with rows of the images DenseNets were made for.
constexpr bool fills_blocks(int64_t rows) { return rows == 7 || rows % 14 == 0; }

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)

namespace detail {

using Register = Vector<float>;
constexpr int64_t kRegister = kLanes<float>;

// One step of the depth: a float, or a pair of bfloat16 in 32 bits, which as a float would often be denormal.
struct FloatStep {
  using T = float;
  using Element = float;
  static constexpr int64_t depth = 1;
  static ALWAYS_INLINE Register add(Register sum, float left, Register right) { return sum + left * right; }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
struct BFloat16Step {
  using T = BFloat16;
  using Element = int32_t;
  static constexpr int64_t depth = 2;
  static ALWAYS_INLINE Register add(Register sum, int32_t left, Register right) {
    const auto pairs = bit_cast<__m512bh>(_mm512_set1_epi32(left));
    return bit_cast<Register>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), pairs, bit_cast<__m512bh>(right)));
  }
};
#endif

// R rows of V registers of columns. A's elements and B's rows are taken in steps of the depth.
template <typename Step, int R, int V>
ALWAYS_INLINE void multiply_block(const Product<typename Step::T, float>& p, Prefetch& prefetch) {
  Register sums[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const float* from = p.c + r * p.c_stride + v * kRegister;
      sums[r][v] = p.accumulate ? load<float>(from, p.columns - v * kRegister) : Register{};
    }
  }
  const int64_t steps = (p.depth + Step::depth - 1) / Step::depth;
  for (int64_t segment = 0; segment < p.segments; segment++) {
    const auto *left = p.a + segment * p.a_segment, *right = p.b + segment * p.b_segment;
    for (int64_t k = 0; k < steps; k++) {
      Register row[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        std::memcpy(&row[v], right + (k * p.b_stride + v * kRegister) * Step::depth, sizeof(row[v]));
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        typename Step::Element element;
        std::memcpy(&element, left + r * p.a_stride + k * Step::depth, sizeof(element));
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[r][v] = Step::add(sums[r][v], element, row[v]);
      }
      if (k % 2 == 0) prefetch.next();
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      store(p.c + r * p.c_stride + v * kRegister, sums[r][v], p.columns - v * kRegister);
    }
  }
}

// A block of ``rows`` <= R rows.
template <typename Step, int R, int V>
ALWAYS_INLINE void multiply_rows(int64_t rows, const Product<typename Step::T, float>& p, Prefetch& prefetch) {
  if constexpr (R > 1) {
    if (rows < R) return multiply_rows<Step, R - 1, V>(rows, p, prefetch);
  }
  multiply_block<Step, R, V>(p, prefetch);
}

// All rows of V registers of columns, in blocks of R rows at most that differ by one row.
template <typename Step, int R, int V>
void multiply_columns(const Product<typename Step::T, float>& p, Prefetch& prefetch) {
  const int64_t blocks = (p.rows + R - 1) / R;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t row = p.rows * block / blocks, next = p.rows * (block + 1) / blocks;
    multiply_rows<Step, R, V>(next - row, p.after_rows(row), prefetch);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
template <typename Step>
void multiply(const Product<typename Step::T, float>& p, Prefetch& prefetch) {
  const bool sevens = fills_blocks(p.rows);
  for (int64_t column = 0; column < p.columns;) {
    const int64_t rest = p.columns - column, width = rest >= 64 ? 64 : rest > 16 ? 32 : 16;
    const auto run = width == 64   ? (sevens ? &multiply_columns<Step, 7, 4> : &multiply_columns<Step, 6, 4>)
                     : width == 32 ? (sevens ? &multiply_columns<Step, 14, 2> : &multiply_columns<Step, 12, 2>)
                                   : &multiply_columns<Step, 12, 1>;
    run(p.after_columns(column), prefetch);
    column += width;
  }
}
#else
template <typename Step>
void multiply(const Product<typename Step::T, float>& p, Prefetch& prefetch) {
  for (int64_t column = 0; column < p.columns; column += 2 * kRegister) {
    const auto run = p.columns - column > kRegister ? &multiply_columns<Step, 6, 2> : &multiply_columns<Step, 12, 1>;
    run(p.after_columns(column), prefetch);
  }
}
#endif

}  // namespace detail

#endif

}  // namespace densenet_efficient::CPU_CAPABILITY
