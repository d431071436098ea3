// Tiles in cache: BN-ReLU on load, transposition, and the scratch that holds them.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/memory.h"
#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

template <typename T>
constexpr int64_t kLine = 64 / sizeof(T);  // elements of a cache line

// The stride of rows that begin with lines of their own, one apart: those of a power of two would share a few sets.
template <typename T>
constexpr int64_t row_stride(int64_t columns) {
  return round_up(columns, kLine<T>) + kLine<T>;
}

// Uninitialised memory on cache lines of its own, with slack behind it: a product reads whole vectors of a row.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(allocate_kept(size * sizeof(T) + kSlack)) {}
  T* get() const { return static_cast<T*>(data_.get()); }

  static constexpr int64_t kSlack = 256;  // bytes

 private:
  c10::DataPtr data_;
};

// relu(x * scale + shift) of one vector.
template <typename V>
ALWAYS_INLINE V activate(V x, V scale, V shift) {
  return relu(affine(x, scale, shift));
}

// Interleaves two rows of lanes into the paired layout of gemm.h: to[2 * i + parity].
template <typename T>
ALWAYS_INLINE void store_pair(T* to, Vector<float> even, Vector<float> odd) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  if constexpr (std::is_same_v<T, BFloat16>) {
    const auto halves = detail::bit_cast<__m512i>(
        _mm512_cvtne2ps_pbh(detail::bit_cast<__m512>(odd), detail::bit_cast<__m512>(even)));  // even ones first
    const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                             21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(in_turn, halves));
    return;
  }
#endif
  constexpr int64_t lanes = kLanes<float>;
  alignas(kVectorBytes) T rows[2][lanes];
  store(rows[0], even);
  store(rows[1], odd);
  for (int64_t i = 0; i < lanes; i++) {
    to[2 * i] = rows[0][i];
    to[2 * i + 1] = rows[1][i];
  }
}

// Puts one of two rows into the paired layout: an even one leaves zeros where an odd one may follow.
ALWAYS_INLINE void store_in_pair(BFloat16* to, bool is_odd, Vector<float> value) {
  detail::DoubleWords pair = detail::widen(to_bfloat16(value));
  if (is_odd) {
    detail::DoubleWords even;
    std::memcpy(&even, to, sizeof(even));
    pair = even | pair << 16;
  }
  std::memcpy(to, &pair, sizeof(pair));
}

// tile [rows, columns] = relu(x * scale + shift), row stride ``stride``; columns up to ``padded`` are zeroed.
template <typename S, typename T, typename A>
void activate_rows(const S* x, int64_t x_stride, const A* scale, const A* shift, int64_t rows, int64_t columns, T* tile,
                   int64_t stride, int64_t padded) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr int64_t block = 4;  // rows that share one load of scale and shift
  for (int64_t row = 0; row < rows; row += block) {
    const int64_t height = std::min(block, rows - row);
    const S* from = x + row * x_stride;
    T* to = tile + row * stride;
    int64_t c = 0;
    for (; c + lanes <= columns; c += lanes) {
      const Vector<A> a = load<A>(scale + c), b = load<A>(shift + c);
      if (height == block) {
#pragma GCC unroll 4
        for (int64_t r = 0; r < block; r++)
          store(to + r * stride + c, activate(load<A>(from + r * x_stride + c), a, b));
      } else {
        for (int64_t r = 0; r < height; r++)
          store(to + r * stride + c, activate(load<A>(from + r * x_stride + c), a, b));
      }
    }
    if (c < columns) {
      const int64_t count = columns - c;
      const Vector<A> a = load<A>(scale + c, count), b = load<A>(shift + c, count);
      for (int64_t r = 0; r < height; r++) {
        store(to + r * stride + c, activate(load<A>(from + r * x_stride + c, count), a, b), count);
      }
    }
    for (int64_t r = 0; r < height; r++) {
      for (int64_t zero = columns; zero < padded; zero++) to[r * stride + zero] = T(0);
    }
  }
}

// to [rows, columns] = from, in the storage's type.
template <typename A, typename S>
void store_rows(const A* from, int64_t from_stride, int64_t rows, int64_t columns, S* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      const int64_t count = columns - c;
      store(to + row * to_stride + c, load<A>(from + row * from_stride + c, count), count);
    }
  }
}

// to [rows, columns] = from, in the accumulation type.
template <typename S, typename A>
void load_rows(const S* from, int64_t from_stride, int64_t rows, int64_t columns, A* to, int64_t to_stride) {
  for (int64_t row = 0; row < rows; row++) {
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      const int64_t count = columns - c;
      store(to + row * to_stride + c, load<A>(from + row * from_stride + c, count), count);
    }
  }
}

constexpr int kSquare = kLanes<float>;  // the rows and columns of a square of floats in registers

// Rows i and i + kSquare / 2, element by element in turn, as rows 2 * i and 2 * i + 1.
template <int... lane>
ALWAYS_INLINE void interleave_halves(const Vector<float>* from, Vector<float>* to,
                                     std::integer_sequence<int, lane...>) {
  constexpr int half = kSquare / 2;
#pragma GCC unroll 8
  for (int i = 0; i < half; i++) {
    to[2 * i] = __builtin_shufflevector(from[i], from[i + half], (lane / 2 + lane % 2 * kSquare)...);
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + half], (half + lane / 2 + lane % 2 * kSquare)...);
  }
}

// Transposes a square: each round of interleaving its halves moves one bit of a row's index into the column's.
ALWAYS_INLINE void transpose_registers(Vector<float>* rows) {
  Vector<float> other[kSquare];
#pragma GCC unroll 4
  for (int size = kSquare; size > 1; size /= 2) {
    interleave_halves(rows, other, std::make_integer_sequence<int, kSquare>());
#pragma GCC unroll 16
    for (int i = 0; i < kSquare; i++) rows[i] = other[i];
  }
}

// [channels, 9] to [9, channels], the taps of a 3x3 convolution first; ``readable`` channels lie there.
template <typename A>
void taps_first(const A* from, int64_t channels, int64_t readable, A* to, int64_t to_stride) {
  int64_t c = 0;
  if constexpr (std::is_same_v<A, float>) {
    for (; c + kSquare <= channels && c + kSquare < readable; c += kSquare) {  // the last vector reads beyond nine taps
      for (int first = 0; first < 9; first += kSquare) {
        Vector<float> block[kSquare];
        for (int i = 0; i < kSquare; i++) block[i] = load<float>(from + (c + i) * 9 + first);
        transpose_registers(block);
        for (int i = 0; i < std::min(kSquare, 9 - first); i++) store(to + (first + i) * to_stride + c, block[i]);
      }
    }
  }
  for (; c < channels; c++) {
    for (int tap = 0; tap < 9; tap++) to[tap * to_stride + c] = from[c * 9 + tap];
  }
}

// [9, channels] to [channels, 9], the inverse of taps_first.
template <typename A>
void taps_last(const A* from, int64_t from_stride, int64_t channels, A* to) {
  int64_t c = 0;
  if constexpr (std::is_same_v<A, float>) {
    constexpr int squares = (9 + kSquare - 1) / kSquare;
    for (; c + 2 * kSquare <= channels; c += kSquare) {
      Vector<float> block[squares][kSquare];
      for (int tap = 0; tap < squares * kSquare; tap++) {
        block[tap / kSquare][tap % kSquare] = tap < 9 ? load<float>(from + tap * from_stride + c) : Vector<float>{};
      }
      for (auto& square : block) transpose_registers(square);
      for (int i = 0; i < kSquare; i++) {  // the last vector writes beyond nine taps what the next channel overwrites
        for (int square = 0; square < squares; square++) store(to + (c + i) * 9 + square * kSquare, block[square][i]);
      }
    }
  }
  for (; c < channels; c++) {
    for (int tap = 0; tap < 9; tap++) to[c * 9 + tap] = from[tap * from_stride + c];
  }
}

// Transposes as many pairs of rows, a pair of elements in each lane, as a square has rows.
ALWAYS_INLINE void transpose_pairs(const BFloat16* from, int64_t from_stride, BFloat16* to, int64_t to_stride) {
  Vector<float> pairs[kSquare];
  for (int i = 0; i < kSquare; i++) {
    detail::Words even, odd;
    std::memcpy(&even, from + 2 * i * from_stride, sizeof(even));
    std::memcpy(&odd, from + (2 * i + 1) * from_stride, sizeof(odd));
    pairs[i] = detail::bit_cast<Vector<float>>(detail::widen(even) | detail::widen(odd) << 16);
  }
  transpose_registers(pairs);
  for (int i = 0; i < kSquare; i++) std::memcpy(to + i * to_stride, &pairs[i], sizeof(pairs[i]));
}

// to [columns, rows] = the transpose of from [rows, columns].
template <typename F, typename T>
void transpose(const F* from, int64_t from_stride, int64_t rows, int64_t columns, T* to, int64_t to_stride) {
  int64_t row = 0;
  if constexpr (std::is_same_v<F, BFloat16> && std::is_same_v<T, BFloat16>) {
    for (; columns % kSquare == 0 && row + 2 * kSquare <= rows; row += 2 * kSquare) {
      for (int64_t column = 0; column < columns; column += kSquare) {
        transpose_pairs(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
      }
    }
  }
  if constexpr (std::is_same_v<Accumulate<F>, float> && std::is_same_v<Accumulate<T>, float>) {
    for (; row + kSquare <= rows; row += kSquare) {
      int64_t column = 0;
      for (; column + kSquare <= columns; column += kSquare) {
        Vector<float> block[kSquare];
        for (int i = 0; i < kSquare; i++) block[i] = load<float>(from + (row + i) * from_stride + column);
        transpose_registers(block);
        for (int i = 0; i < kSquare; i++) store(to + (column + i) * to_stride + row, block[i]);
      }
      for (; column < columns; column++) {
        for (int i = 0; i < kSquare; i++)
          to[column * to_stride + row + i] = static_cast<T>(from[(row + i) * from_stride + column]);
      }
    }
  }
  for (; row < rows; row++) {
    for (int64_t column = 0; column < columns; column++) {
      to[column * to_stride + row] = static_cast<T>(from[row * from_stride + column]);
    }
  }
}

// Packs a gemm's right operand [depth, columns] whose row k stands at row_of(k): in pairs where T asks for them.
template <typename T, typename RowOf>
void pack_gathered(int64_t depth, int64_t columns, T* to, RowOf row_of) {
  if constexpr (!kPairedRows<T>) {
    for (int64_t k = 0; k < depth; k++) {
      const T* row = row_of(k);
      for (int64_t n = 0; n < columns; n += kLanes<T>) {
        store(to + k * columns + n, load<T>(row + n, columns - n), columns - n);
      }
    }
  } else {
    for (int64_t k = 0; k < depth; k += 2) {
      const auto *even = row_of(k), *odd = k + 1 < depth ? row_of(k + 1) : nullptr;
      T* pair = to + k * columns;
      int64_t n = 0;
      for (; n + kLanes<float> <= columns; n += kLanes<float>) {
        store_pair(pair + 2 * n, load<float>(even + n), odd ? load<float>(odd + n) : Vector<float>{});
      }
      for (; n < columns; n++) {
        pair[2 * n] = static_cast<T>(even[n]);
        pair[2 * n + 1] = odd ? static_cast<T>(odd[n]) : T(0);
      }
    }
  }
}

}  // namespace densenet_efficient::CPU_CAPABILITY
