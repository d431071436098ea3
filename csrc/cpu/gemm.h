// Small matrix products on tiles in cache: oneDNN's micro-kernels where this CPU has them, else torch's BLAS.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace densenet_efficient {

// The type of a product's operands in storage type T: T itself where this CPU multiplies it, else float.
bool multiplies_bfloat16();
bool multiplies_half();

// C [rows, columns] (+)= A [rows, depth] @ B [depth, columns], row-major with row strides a, b, c (in elements).
// A 16-bit B comes in pairs of rows: element (k, n) at B[(k / 2) * 2 * b + 2 * n + k % 2], its depth padded to even.
template <typename T, typename A>
void gemm(int64_t rows, int64_t columns, int64_t depth, const T* matrix_a, int64_t a, const T* matrix_b, int64_t b,
          A* matrix_c, int64_t c, bool accumulate);

// Each thread calls this after its last gemm: AMX tiles are a state of the CPU.
template <typename T>
void release_gemm();

// Whether B comes in pairs of rows.
template <typename T>
constexpr bool kPairedRows = sizeof(T) == 2;

}  // namespace densenet_efficient
