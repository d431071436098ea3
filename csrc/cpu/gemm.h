// Small matrix products on tiles in cache by torch, for operands without a micro-kernel of this project's own.
#pragma once

#include <c10/util/Half.h>

#include <cstdint>

namespace densenet_efficient {

// Whether gemm multiplies Half on this CPU.
bool multiplies_half();

// C [rows, columns] (+)= A [rows, depth] @ B [depth, columns], row-major with row strides a, b, c (in elements), for
// T float, double or Half. A 16-bit B comes in pairs of rows: element (k, n) at B[(k / 2) * 2 * b + 2 * n + k % 2], its
// depth padded to even.
template <typename T, typename A>
void gemm(int64_t rows, int64_t columns, int64_t depth, const T* matrix_a, int64_t a, const T* matrix_b, int64_t b,
          A* matrix_c, int64_t c, bool accumulate);

// Each thread calls this after its last gemm of Half: AMX tiles are a state of the CPU.
void release_gemm();

// Whether B comes in pairs of rows.
template <typename T>
constexpr bool kPairedRows = sizeof(T) == 2;

}  // namespace densenet_efficient
