// The matrix product of a tile, and the memory that its successor needs, asked for meanwhile.
//
// oneDNN's micro-kernels run at the peak on data in cache, but nothing else can run beside them: the next tile's misses
// then cost as much again as 15 to 30 % of the product. So where this file's own micro-kernel is as fast (AVX-512 in
// float32, AVX-512 BF16 without AMX) it is used, and it spreads prefetches over its multiplications.
#pragma once

#include "cpu/gemm.h"
#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Whether blocks of seven or fourteen rows leave no rest: so it is with rows of the images DenseNets were made for.
constexpr bool fills_blocks(int64_t rows) { return rows == 7 || rows % 14 == 0; }

// Blocks of matrices whose cache lines are to be asked for, one line at a time, in the order of their addition.
class Prefetch {
 public:
  // Adds a block [rows, columns]; nothing where it is null or empty, or where too many blocks wait.
  template <typename T>
  void add(const T* block, int64_t stride, int64_t rows, int64_t columns) {
    if (block == nullptr || rows <= 0 || waiting_ == kMost) return;
    const int64_t size = sizeof(T);
    blocks_[waiting_++] = {reinterpret_cast<const char*>(block), stride * size, columns * size, rows};
  }

  ALWAYS_INLINE void next() {
    if (waiting_ > 0) ask();
  }

 private:
  struct Block {
    const char* row;
    int64_t stride, bytes, rows;
  };
  static constexpr int kMost = 4;

  ALWAYS_INLINE void ask() {
    Block& block = blocks_[0];
    __builtin_prefetch(block.row + byte_, 0, 2);
    byte_ += 64;
    if (byte_ < block.bytes) return;
    byte_ = 0;
    block.row += block.stride;
    if (--block.rows > 0) return;
    for (int i = 1; i < waiting_; i++) blocks_[i - 1] = blocks_[i];
    waiting_--;
  }

  Block blocks_[kMost];
  int waiting_ = 0;
  int64_t byte_ = 0;
};

#if defined(CPU_CAPABILITY_AVX512)

namespace detail {

// One step of the depth: a float, or a pair of bfloat16 in 32 bits.
struct FloatStep {
  using T = float;
  static constexpr int64_t depth = 1;
  static ALWAYS_INLINE Vector<float> add(Vector<float> sum, float left, Vector<float> right) {
    return sum + left * right;
  }
};

#if defined(CPU_CAPABILITY_AVX512_BF16)
struct BFloat16Step {
  using T = BFloat16;
  static constexpr int64_t depth = 2;
  static ALWAYS_INLINE Vector<float> add(Vector<float> sum, float left, Vector<float> right) {
    const auto pairs = bit_cast<__m512bh>(broadcast(left));
    return bit_cast<Vector<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), pairs, bit_cast<__m512bh>(right)));
  }
};
#endif

// C [R, V * 16] (+)= A @ B in registers. A's elements and B's rows are taken in steps of the depth.
template <typename Step, int R, int V>
ALWAYS_INLINE void multiply_block(int64_t steps, const typename Step::T* left, int64_t left_stride,
                                  const typename Step::T* right, int64_t right_stride, float* out, int64_t out_stride,
                                  int64_t columns, bool accumulate, Prefetch& prefetch) {
  Vector<float> sums[R][V] = {};
  for (int64_t k = 0; k < steps; k++) {
    Vector<float> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) std::memcpy(&row[v], right + (k * right_stride + v * 16) * Step::depth, sizeof(row[v]));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float element;
      std::memcpy(&element, left + r * left_stride + k * Step::depth, sizeof(element));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sums[r][v] = Step::add(sums[r][v], element, row[v]);
    }
    if (k % 2 == 0) prefetch.next();
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      float* to = out + r * out_stride + v * 16;
      const int64_t count = columns - v * 16;
      store(to, accumulate ? load<float>(static_cast<const float*>(to), count) + sums[r][v] : sums[r][v], count);
    }
  }
}

// All rows of V * 16 columns: blocks of the most rows that the registers hold, then smaller ones.
template <typename Step, int R, int V>
void multiply_columns(int64_t rows, int64_t steps, const typename Step::T* left, int64_t left_stride,
                      const typename Step::T* right, int64_t right_stride, float* out, int64_t out_stride,
                      int64_t columns, bool accumulate, Prefetch& prefetch) {
  int64_t row = 0;
  for (; row + R <= rows; row += R) {
    multiply_block<Step, R, V>(steps, left + row * left_stride, left_stride, right, right_stride,
                               out + row * out_stride, out_stride, columns, accumulate, prefetch);
  }
  if constexpr (R > 1) {
    if (row < rows) {
      multiply_columns<Step, R / 2, V>(rows - row, steps, left + row * left_stride, left_stride, right, right_stride,
                                       out + row * out_stride, out_stride, columns, accumulate, prefetch);
    }
  }
}

template <typename Step>
void multiply(int64_t rows, int64_t columns, int64_t depth, const typename Step::T* a, int64_t a_stride,
              const typename Step::T* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate,
              Prefetch& prefetch) {
  const int64_t steps = (depth + Step::depth - 1) / Step::depth;
  const bool few_rows = rows <= 32, sevens = fills_blocks(rows);
  for (int64_t column = 0; column < columns;) {
    const int64_t rest = columns - column, width = rest >= 64 && (sevens || !few_rows) ? 64 : rest > 16 ? 32 : 16;
    const auto run = width == 64             ? (sevens ? &multiply_columns<Step, 7, 4> : &multiply_columns<Step, 6, 4>)
                     : width == 32 && sevens ? &multiply_columns<Step, 14, 2>
                     : width == 32 && few_rows ? &multiply_columns<Step, 8, 2>
                     : width == 32             ? &multiply_columns<Step, 12, 2>
                                               : &multiply_columns<Step, 12, 1>;
    run(rows, steps, a, a_stride, b + column * Step::depth, b_stride, c + column, c_stride, rest, accumulate, prefetch);
    column += width;
  }
}

}  // namespace detail

#endif

// gemm of gemm.h, asking for the lines of ``prefetch`` meanwhile where it can.
template <typename T, typename A>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_stride, const T* b, int64_t b_stride,
              A* c, int64_t c_stride, bool accumulate, [[maybe_unused]] Prefetch& prefetch) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return detail::multiply<detail::FloatStep>(rows, columns, depth, a, a_stride, b, b_stride, c, c_stride, accumulate,
                                               prefetch);
  }
#endif
#if defined(CPU_CAPABILITY_AVX512_BF16)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (!has_amx()) {
      return detail::multiply<detail::BFloat16Step>(rows, columns, depth, a, a_stride, b, b_stride, c, c_stride,
                                                    accumulate, prefetch);
    }
  }
#endif
  gemm(rows, columns, depth, a, a_stride, b, b_stride, c, c_stride, accumulate);
}

}  // namespace densenet_efficient::CPU_CAPABILITY
