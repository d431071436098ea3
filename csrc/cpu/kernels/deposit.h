// What a convolution's backward does with the gradient of its activations, once per element: it recomputes the
// activation, masks the gradient by it, takes the sums of the batch norm's gradients and leaves scale times the masked
// gradient behind.
#pragma once

#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {

// A block of pixels by channels; pointers at its first element, strides in elements.
template <typename S, typename T>
struct Deposit {
  using A = Accumulate<S>;

  int64_t rows, columns;
  const S* x;
  int64_t x_stride;
  const A *mean, *scale, *shift;  // [columns]
  const A* gradient;              // of the activations, or null where only these are wanted
  int64_t gradient_stride;
  S* grad;  // receives scale times the masked gradient, or null
  int64_t grad_stride;
  bool accumulate;
  T* activations;  // as the right operand of a product (gemm.h), or null
  int64_t activations_stride;
  A *sum_grad, *sum_grad_x;  // [columns], added to; not read without a gradient

  void run() const {
    constexpr int64_t lanes = kLanes<A>;
    int64_t column = 0;
#if defined(CPU_CAPABILITY_AVX512)  // which has registers for four vectors' sums and maps
    for (; column + 4 * lanes <= columns; column += 4 * lanes) strip<4>(column, lanes);
#endif
    for (; column + 2 * lanes <= columns; column += 2 * lanes) strip<2>(column, lanes);
    for (; column < columns; column += lanes) strip<1>(column, columns - column);
  }

 private:
  // The maps and sums of V vectors of channels, in registers.
  template <int V>
  struct Channels {
    Vector<A> mean[V], scale[V], shift[V], sum[V], sum_x[V];
  };

  // All rows of V vectors of channels: few rows' lines at a time, where a column of vectors would touch them all.
  template <int V>
  void strip(int64_t column, int64_t count) const {
    constexpr int64_t lanes = kLanes<A>, step = kPairedRows<T> ? 2 : 1;
    Channels<V> channels{};
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      const int64_t c = column + v * lanes;
      channels.scale[v] = load_lanes<V>(scale + c, count);
      channels.shift[v] = load_lanes<V>(shift + c, count);
      if (gradient) channels.mean[v] = load_lanes<V>(mean + c, count);
    }
    for (int64_t row = 0; row < rows; row += step) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const int64_t c = column + v * lanes;
        const Vector<A> first = element(channels, v, row, c, count);
        if constexpr (kPairedRows<T>) {
          const Vector<A> second = row + 1 < rows ? element(channels, v, row + 1, c, count) : Vector<A>{};
          if (activations) store_pair(activations + row * activations_stride + 2 * c, first, second);
        } else {
          if (activations) store(activations + row * activations_stride + c, first, count);
        }
      }
    }
    if (!gradient) return;
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      add_to(sum_grad + column + v * lanes, channels.sum[v], count);
      add_to(sum_grad_x + column + v * lanes, channels.sum_x[v], count);
    }
  }

  // Returns the activation.
  template <int V>
  ALWAYS_INLINE Vector<A> element(Channels<V>& channels, int v, int64_t row, int64_t c, int64_t count) const {
    const Vector<A> value = load_lanes<V>(x + row * x_stride + c, count);
    const Vector<A> activation = activate(value, channels.scale[v], channels.shift[v]);
    if (!gradient) return activation;
    const Vector<A> masked = relu_mask(activation, load_lanes<V>(gradient + row * gradient_stride + c, count));
    channels.sum[v] += masked;
    channels.sum_x[v] += masked * (value - channels.mean[v]);
    if (grad) {
      S* to = grad + row * grad_stride + c;
      const Vector<A> before = accumulate ? load_lanes<V>(static_cast<const S*>(to), count) : Vector<A>{};
      store(to, before + masked * channels.scale[v], count);
    }
    return activation;
  }

  // Several vectors are always whole.
  template <int V, typename F>
  static ALWAYS_INLINE Vector<A> load_lanes(const F* from, int64_t count) {
    if constexpr (V > 1) return load<A>(from);
    return load<A>(from, count);
  }

  static ALWAYS_INLINE void add_to(A* to, Vector<A> sum, int64_t count) {
    store(to, load<A>(static_cast<const A*>(to), count) + sum, count);
  }
};

}  // namespace densenet_efficient::CPU_CAPABILITY
