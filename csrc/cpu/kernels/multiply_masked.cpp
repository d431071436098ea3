#include "cpu/kernels/multiply_masked.h"

#include "cpu/kernels/registers.h"

namespace densenet_efficient::CPU_CAPABILITY {

#if defined(SKIPS_ZEROS)

namespace {

using detail::bit_cast;
using detail::kRegister;
using detail::Register;

constexpr int kLeastRegisters = 96 / kRegister, kMostRegisters = 192 / kRegister;  // of a row
constexpr int kUnit = kSkippingColumns / kRegister;

#if defined(CPU_CAPABILITY_AVX512)

constexpr int kTogether = 4;  // products of a row, whose sums do not wait for each other

// The sums of the lanes of each register.
ALWAYS_INLINE void store_sums(float* to, const Register* sums) {
  const auto pair = [](Register left, Register right) {
    const auto l = bit_cast<__m512>(left), r = bit_cast<__m512>(right);
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(l, r), _mm512_unpackhi_ps(l, r)));
  };
  const __m512d ab = pair(sums[0], sums[1]), cd = pair(sums[2], sums[3]);
  const __m512 all =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// The values, each to the column of its bit, and zeros between them.
ALWAYS_INLINE void spread(const float* values, uint64_t mask, float* to) {
  for (int64_t column = 0; column < kMaskBits; column += kRegister) {
    const auto here = static_cast<__mmask16>(mask >> column);
    _mm512_storeu_ps(to + column, _mm512_maskz_expandloadu_ps(here, values));
    values += __builtin_popcount(here);
  }
}

#else

constexpr int kTogether = 8;

ALWAYS_INLINE void store_sums(float* to, const Register* sums) {
  const auto pair = [&](int i) { return _mm256_hadd_ps(bit_cast<__m256>(sums[i]), bit_cast<__m256>(sums[i + 1])); };
  const __m256 first = _mm256_hadd_ps(pair(0), pair(2)), second = _mm256_hadd_ps(pair(4), pair(6));
  _mm256_storeu_ps(
      to, _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31)));
}

ALWAYS_INLINE void spread(const float* values, uint64_t mask, float* to) {
  for (int64_t column = 0; column < kMaskBits; column += kRegister) store(to + column, Register{});
  for (; mask; mask &= mask - 1) to[__builtin_ctzll(mask)] = *values++;
}

#endif

// Products of a row in V registers with kTogether rows of B.
template <int V>
ALWAYS_INLINE void store_products(const Register* row, const float* const* b, float* to) {
  constexpr int chains = 8 / kTogether;
  Register sums[kTogether][chains];
#pragma GCC unroll 24
  for (int v = 0; v < V; v++) {
#pragma GCC unroll 8
    for (int i = 0; i < kTogether; i++) {
      const Register product = row[v] * load<float>(b[i] + v * kRegister);
      sums[i][v % chains] = v < chains ? product : sums[i][v % chains] + product;
    }
  }
  Register totals[kTogether];
#pragma GCC unroll 8
  for (int i = 0; i < kTogether; i++) totals[i] = chains > 1 ? sums[i][0] + sums[i][chains - 1] : sums[i][0];
  store_sums(to, totals);
}

template <int V>
void multiply_rows(const MaskedProduct& p, const uint64_t* masks, Prefetch& prefetch) {
  alignas(64) float results[kMaskBits + kRegister];
  for (int64_t row = 0; row < p.rows; row++) {
    Register values[V];
#pragma GCC unroll 24
    for (int v = 0; v < V; v++) values[v] = load<float>(p.a + row * p.a_stride + v * kRegister);
    uint64_t mask = masks[row];
    const int count = __builtin_popcountll(mask);
    for (int i = 0; i < count; i += kTogether) {
      const float* b[kTogether];
#pragma GCC unroll 8
      for (int j = 0; j < kTogether; j++) {  // behind the last one, any: nobody reads its result
        b[j] = p.b + __builtin_ctzll(mask | uint64_t{1} << (kMaskBits - 1)) * V * kRegister;
        mask &= mask - 1;
      }
      store_products<V>(values, b, results + i);
      for (int j = 0; j < kTogether / 2; j++) prefetch.next();
    }
    spread(results, masks[row], p.c + row * p.c_stride);
  }
}

}  // namespace

void multiply_masked(const MaskedProduct& p, Prefetch& prefetch) {
  uint64_t masks[kMaskedRows];
  mask_rows(p.activations, p.activations_stride, p.rows, p.columns, masks);
  with_registers<kLeastRegisters, kMostRegisters, kUnit>(p.depth / kRegister,
                                                         [&]<int V>() { multiply_rows<V>(p, masks, prefetch); });
}

#endif

}  // namespace densenet_efficient::CPU_CAPABILITY
