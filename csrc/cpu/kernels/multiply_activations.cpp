#include "cpu/kernels/multiply_activations.h"

#include <unistd.h>

#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {

#if defined(CPU_CAPABILITY_AVX512)

namespace {

using detail::bit_cast;
using detail::kRegister;
using detail::Register;

constexpr int64_t kMostSteps = 64;  // of B at a time; one bit each
constexpr int64_t kMostRows = 128;
constexpr int kMostRegisters = 8;  // of the sums of a row, of two rows at a time

ALWAYS_INLINE __mmask16 nonzero(const float* from) {
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(from), _mm512_setzero_ps(), _CMP_NEQ_UQ);  // NaN is one of them
}

constexpr uint64_t first_bits(int64_t count) { return count < 64 ? (uint64_t{1} << count) - 1 : ~uint64_t{0}; }

// Of each row, which of its values are not zero. A reads whole vectors, of which those behind the depth do not count.
void mask_rows(const float* a, int64_t stride, int64_t rows, int64_t depth, uint64_t* masks) {
  const uint64_t valid = first_bits(depth);
  for (int64_t row = 0; row < rows; row++) {
    uint64_t mask = 0;
    for (int64_t k = 0; k < depth; k += kRegister) {
      mask |= static_cast<uint64_t>(nonzero(a + row * stride + k)) << k;
    }
    masks[row] = mask & valid;
  }
}

// The same of each column.
void mask_columns(const float* a, int64_t stride, int64_t columns, int64_t depth, uint64_t* masks) {
  for (int64_t column = 0; column < columns; column += kRegister) {
    __m512i halves[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t k = 0; k < depth; k++) {
      const __m512i bit = _mm512_set1_epi32(static_cast<int>(uint32_t{1} << (k % 32)));
      halves[k / 32] = _mm512_mask_or_epi32(halves[k / 32], nonzero(a + k * stride + column), halves[k / 32], bit);
    }
    alignas(64) uint32_t low[kRegister], high[kRegister];
    _mm512_store_si512(low, halves[0]);
    _mm512_store_si512(high, halves[1]);
    for (int64_t i = 0; i < kRegister; i++) masks[column + i] = uint64_t{high[i]} << 32 | low[i];
  }
}

// Calls function.template operator()<V>() with V = count, of Least to Most.
template <int Least, int Most, typename Function>
ALWAYS_INLINE void with_registers(int64_t count, Function function) {
  if constexpr (Most > Least) {
    if (count < Most) return with_registers<Least, Most - 1>(count, function);
  }
  function.template operator()<Most>();
}

// One row of a product's sums in V registers.
template <int V>
struct SkippingRow {
  const float* a;
  uint64_t mask;
  float* c;
  Register sums[V];

  ALWAYS_INLINE void begin(bool accumulate) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[v] = accumulate ? load<float>(c + v * kRegister) : Register{};
  }
  ALWAYS_INLINE void add_next(const float* b, int64_t b_stride, int64_t a_step) {
    const int64_t k = __builtin_ctzll(mask);
    mask &= mask - 1;
    const float left = a[k * a_step];
    const float* right = b + k * b_stride;
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[v] += left * load<float>(right + v * kRegister);
  }
  ALWAYS_INLINE void end() const {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(c + v * kRegister, sums[v]);
  }
};

// Two rows side by side: the sums of one alone wait for each other.
template <int V>
void multiply_two(SkippingRow<V> first, SkippingRow<V> second, const ActivationProduct& p) {
  first.begin(p.accumulate);
  second.begin(p.accumulate);
  const int both = std::min(__builtin_popcountll(first.mask), __builtin_popcountll(second.mask));
  for (int i = 0; i < both; i++) {
    first.add_next(p.b, p.b_stride, p.a_step);
    second.add_next(p.b, p.b_stride, p.a_step);
  }
  while (first.mask) first.add_next(p.b, p.b_stride, p.a_step);
  while (second.mask) second.add_next(p.b, p.b_stride, p.a_step);
  first.end();
  second.end();
}

// V registers of columns of all rows, of which ``masks`` tells what is not zero.
template <int V>
void multiply_rows(const ActivationProduct& p, const uint64_t* masks, Prefetch& prefetch) {
  alignas(64) float nowhere[V * kRegister];
  for (int64_t row = 0; row < p.rows; row += 2) {
    const bool is_single = row + 1 == p.rows;
    const SkippingRow<V> first{.a = p.a + row * p.a_row, .mask = masks[row], .c = p.c + row * p.c_stride, .sums = {}};
    const SkippingRow<V> second{.a = first.a + p.a_row,
                                .mask = is_single ? 0 : masks[row + 1],
                                .c = is_single ? nowhere : first.c + p.c_stride,
                                .sums = {}};
    multiply_two(first, second, p);
    for (int i = 0; i < V; i++) prefetch.next();
  }
}

// As many steps of B as take two thirds of the first cache, which is a small one where the system does not say.
int64_t steps_at_a_time(int64_t columns) {
  static const int64_t bytes = [] {
    const int64_t told = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return told > 0 ? told : 32 << 10;
  }();
  return std::clamp<int64_t>(bytes * 2 / 3 / (columns * sizeof(float)), 16, kMostSteps);
}

// Columns that the registers hold of two rows.
void multiply_columns(ActivationProduct p, Prefetch& prefetch) {
  uint64_t masks[kMostRows + kRegister];
  const int64_t depth = p.depth, chunks = ceil_div(depth, steps_at_a_time(p.columns));
  for (int64_t chunk = 0, k = 0; chunk < chunks; chunk++) {
    const int64_t steps = depth * (chunk + 1) / chunks - k;
    if (p.a_step == 1) {
      mask_rows(p.a, p.a_row, p.rows, steps, masks);
    } else {
      mask_columns(p.a, p.a_step, p.rows, steps, masks);
    }
    if (!p.is_finite) std::fill_n(masks, p.rows, first_bits(steps));
    with_registers<4, kMostRegisters>(p.columns / kRegister, [&]<int V>() { multiply_rows<V>(p, masks, prefetch); });
    p.a += steps * p.a_step;
    p.b += steps * p.b_stride;
    p.accumulate = true;
    k += steps;
  }
}

// The sums of the lanes of four registers.
ALWAYS_INLINE __m128 sum_lanes(Register a, Register b, Register c, Register d) {
  const auto pair = [](Register left, Register right) {
    const auto l = bit_cast<__m512>(left), r = bit_cast<__m512>(right);
    return _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(l, r), _mm512_unpackhi_ps(l, r)));
  };
  const __m512d ab = pair(a, b), cd = pair(c, d);
  const __m512 all =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The products of a row in V registers with one of B, still to be summed.
template <int V>
ALWAYS_INLINE Register dot(const Register* row, const float* b) {
  Register even = row[0] * load<float>(b), odd = row[1] * load<float>(b + kRegister);
#pragma GCC unroll 12
  for (int v = 2; v < V; v++) (v % 2 ? odd : even) += row[v] * load<float>(b + v * kRegister);
  return even + odd;
}

template <int V>
void multiply_masked(const ActivationGradient& p, const uint64_t* masks, Prefetch& prefetch) {
  alignas(64) float results[kMostSteps + kRegister];
  for (int64_t row = 0; row < p.rows; row++) {
    Register values[V];
#pragma GCC unroll 12
    for (int v = 0; v < V; v++) values[v] = load<float>(p.a + row * p.a_stride + v * kRegister);
    uint64_t mask = masks[row];
    const int count = __builtin_popcountll(mask);
    const auto next = [&] {  // behind the last one, any: nobody reads its result
      const int64_t column = __builtin_ctzll(mask | uint64_t{1} << (kMostSteps - 1));
      mask &= mask - 1;
      return p.b + column * V * kRegister;
    };
    for (int i = 0; i < count; i += 4) {
      const float *b0 = next(), *b1 = next(), *b2 = next(), *b3 = next();
      _mm_store_ps(results + i,
                   sum_lanes(dot<V>(values, b0), dot<V>(values, b1), dot<V>(values, b2), dot<V>(values, b3)));
      prefetch.next();
      prefetch.next();
    }
    int before = 0;
    for (int64_t column = 0; column < kMostSteps; column += kRegister) {
      const auto here = static_cast<__mmask16>(masks[row] >> column);
      _mm512_storeu_ps(p.c + row * p.c_stride + column, _mm512_maskz_expandloadu_ps(here, results + before));
      before += __builtin_popcount(here);
    }
  }
}

}  // namespace

void multiply_skipping(const ActivationProduct& p, Prefetch& prefetch) {
  const int64_t registers = p.columns / kRegister, parts = ceil_div(registers, kMostRegisters);
  for (int64_t index = 0, column = 0; index < parts; index++) {
    ActivationProduct part = p;
    part.columns = registers * (index + 1) / parts * kRegister - column;
    part.b += column;
    part.c += column;
    multiply_columns(part, prefetch);
    column += part.columns;
  }
}

void multiply_skipping(const ActivationGradient& p, Prefetch& prefetch) {
  uint64_t masks[kMostRows];
  mask_rows(p.activations, p.activations_stride, p.rows, p.columns, masks);
  with_registers<6, 12>(p.depth / kRegister, [&]<int V>() { multiply_masked<V>(p, masks, prefetch); });
}

#endif

}  // namespace densenet_efficient::CPU_CAPABILITY
