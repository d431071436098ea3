#include "cpu/kernels/multiply_activations.h"

#include <unistd.h>

#include "cpu/kernels/registers.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {

#if defined(SKIPS_ZEROS)

namespace {

using detail::kRegister;
using detail::Register;

constexpr int kLeastRegisters = 4, kMostRegisters = 8, kUnit = kSkippingColumns / kRegister;  // of the sums of a row

// Where a column of B lies in its strips.
constexpr int64_t in_strips(int64_t column, int64_t b_strip) {
  return column / kStripColumns<float> * b_strip + column % kStripColumns<float>;
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
  ALWAYS_INLINE void add_next(const ActivationProduct& p) {
    const int64_t k = __builtin_ctzll(mask);
    mask &= mask - 1;
    const float left = a[k * p.a_step];
    const float* right = p.b + k * p.b_stride;
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[v] += left * load<float>(right + in_strips(v * kRegister, p.b_strip));
  }
  ALWAYS_INLINE void end() const {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(c + v * kRegister, sums[v]);
  }
};

// Two rows side by side: on AVX-512 the sums of one alone wait for each other.
template <int V>
void multiply_two(SkippingRow<V> first, SkippingRow<V> second, const ActivationProduct& p) {
  first.begin(p.accumulate);
  second.begin(p.accumulate);
  const int both = std::min(__builtin_popcountll(first.mask), __builtin_popcountll(second.mask));
  for (int i = 0; i < both; i++) {
    first.add_next(p);
    second.add_next(p);
  }
  while (first.mask) first.add_next(p);
  while (second.mask) second.add_next(p);
  first.end();
  second.end();
}

// For AVX2, which has no registers for two rows.
template <int V>
void multiply_one(SkippingRow<V> row, const ActivationProduct& p) {
  row.begin(p.accumulate);
  while (row.mask) row.add_next(p);
  row.end();
}

// V registers of columns of all rows, of which ``masks`` tells what is not zero.
template <int V>
void multiply_rows(const ActivationProduct& p, const uint64_t* masks, Prefetch& prefetch) {
  const auto row_at = [&](int64_t row) {
    return SkippingRow<V>{.a = p.a + row * p.a_row, .mask = masks[row], .c = p.c + row * p.c_stride, .sums = {}};
  };
  int64_t row = 0;
#if defined(CPU_CAPABILITY_AVX512)
  for (; row + 2 <= p.rows; row += 2) {
    multiply_two(row_at(row), row_at(row + 1), p);
    for (int i = 0; i < V; i++) prefetch.next();
  }
#endif
  for (; row < p.rows; row++) {
    multiply_one(row_at(row), p);
    for (int i = 0; i < V / 2; i++) prefetch.next();
  }
}

// As many steps of B as take two thirds of the first cache, which is a small one where the system does not say.
int64_t steps_at_a_time(int64_t columns) {
  static const int64_t bytes = [] {
    const int64_t told = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    return told > 0 ? told : 32 << 10;
  }();
  return std::clamp<int64_t>(bytes * 2 / 3 / (columns * sizeof(float)), 16, kMaskBits);
}

// As many columns as registers hold.
void multiply_columns(ActivationProduct p, Prefetch& prefetch) {
  uint64_t masks[kMaskedRows + kRegister];
  const int64_t depth = p.depth, chunks = ceil_div(depth, steps_at_a_time(p.columns));
  for (int64_t chunk = 0, k = 0; chunk < chunks; chunk++) {
    const int64_t steps = depth * (chunk + 1) / chunks - k;
    if (p.a_step == 1) {
      mask_rows(p.a, p.a_row, p.rows, steps, masks);
    } else {
      mask_columns(p.a, p.a_step, p.rows, steps, masks);
    }
    if (!p.is_finite) std::fill_n(masks, p.rows, first_bits(steps));
    with_registers<kLeastRegisters, kMostRegisters, kUnit>(p.columns / kRegister,
                                                           [&]<int V>() { multiply_rows<V>(p, masks, prefetch); });
    p.a += steps * p.a_step;
    p.b += steps * p.b_stride;
    p.accumulate = true;
    k += steps;
  }
}

}  // namespace

void multiply_skipping(const ActivationProduct& p, Prefetch& prefetch) {
  const int64_t units = p.columns / kSkippingColumns, parts = ceil_div(p.columns, kMostRegisters * kRegister);
  for (int64_t index = 0, column = 0; index < parts; index++) {
    ActivationProduct part = p;
    part.columns = units * (index + 1) / parts * kSkippingColumns - column;
    part.b += in_strips(column, p.b_strip);
    part.c += column;
    multiply_columns(part, prefetch);
    column += part.columns;
  }
}

#endif

}  // namespace densenet_efficient::CPU_CAPABILITY
