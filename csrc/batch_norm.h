// The element-wise mathematics of a batch norm and its ReLU, for the host and for the device: V is a number, or one of
// the compiler's own vectors of them.
#pragma once

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace densenet_efficient {

template <typename V>
HOST_DEVICE V affine(V x, V scale, V shift) {
  return x * scale + shift;
}

// max(value, 0) that keeps NaN.
template <typename V>
HOST_DEVICE V relu(V value) {
  return value < 0 ? V{} : value;
}

// The number nearest to ``value`` that storage type S holds.
template <typename S, typename A>
HOST_DEVICE A rounded(A value) {
  return static_cast<A>(static_cast<S>(value));
}

// ``gradient`` where the ReLU's ``activation`` let it pass: not where activation <= ``zero``, so NaN passes. ``zero``
// is the largest number that the activation's storage would round to zero.
template <typename V>
HOST_DEVICE V relu_mask(V activation, V gradient, V zero = V{}) {
  return activation <= zero ? V{} : gradient;
}

// The gradient of a channel's values after the batch norm's projection.
template <typename V>
HOST_DEVICE V projected(V gradient, V x, V mean, V slope, V offset) {
  return gradient + offset + (x - mean) * slope;
}

// ---- mean and sum of squared deviations (m2), never E[x^2] - E[x]^2 (Chan, Golub and LeVeque 1983)

// Further values enter: ``deviations`` is the sum of their differences from the present mean, ``squares`` that of the
// squares, ``inverse_count`` one over the number of values they make together. Where there were none before, the
// present mean is any guess near the values.
template <typename V, typename A>
HOST_DEVICE void add_deviations(V& mean, V& m2, V deviations, V squares, A inverse_count) {
  const V step = deviations * inverse_count;
  mean += step;
  m2 += squares - deviations * step;
}

// Another set of values enters, of moments of its own; at least one of the two counts is not zero.
template <typename V, typename A>
HOST_DEVICE void merge_moments(V& mean, V& m2, A count, V other_mean, V other_m2, A other_count) {
  const A share = other_count / (count + other_count);
  const V difference = other_mean - mean;
  mean += difference * share;
  m2 += other_m2 + difference * difference * (count * share);
}

}  // namespace densenet_efficient
