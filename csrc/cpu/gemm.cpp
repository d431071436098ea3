#include "cpu/gemm.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

namespace densenet_efficient {
namespace {

using c10::Half;

namespace blas = at::native::cpublas;

// torch tells only by an exception whether oneDNN has micro-kernels for Half on this CPU, and not which layout of B
// they take: with AVX-512 FP16 alone it is another one than with AMX. So a product tells, whose B has a value of its
// own in each row and column.
bool probe_brgemm() {
  constexpr int size = 16;
  alignas(64) Half ones[size * size], right[size * size];
  alignas(64) float product[size * size];
  float expected[size] = {};
  for (int k = 0; k < size; k++) {
    for (int n = 0; n < size; n++) {
      const float value = static_cast<float>((k + 1) * (n % 4 + 1) % 7);
      ones[k * size + n] = Half(1);
      right[k / 2 * 2 * size + 2 * n + k % 2] = Half(value);
      expected[n] += value;
    }
  }
  try {
    blas::brgemm(size, size, size, size, size, size, false, ones, right, product, true);
    blas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  for (int i = 0; i < size * size; i++) {
    if (product[i] != expected[i % size]) return false;
  }
  return true;
}

template <typename T>
at::Tensor as_matrix(const T* data, int64_t rows, int64_t columns, int64_t stride) {
  return at::from_blob(const_cast<T*>(data), {rows, columns}, {stride, 1}, c10::CppTypeToScalarType<T>::value);
}

}  // namespace

bool multiplies_half() {
  static const bool answer = probe_brgemm();
  return answer;
}

template <typename T, typename A>
void gemm(int64_t rows, int64_t columns, int64_t depth, const T* matrix_a, int64_t a, const T* matrix_b, int64_t b,
          A* matrix_c, int64_t c, bool accumulate) {
  if constexpr (std::is_same_v<T, Half>) {
    const int64_t padded = (depth + 1) / 2 * 2;
    blas::brgemm(rows, columns, padded, a, b, c, accumulate, matrix_a, matrix_b, matrix_c, true);
  } else {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor left = as_matrix(matrix_a, rows, depth, a), right = as_matrix(matrix_b, depth, columns, b);
    at::Tensor product = as_matrix(matrix_c, rows, columns, c);
    if (accumulate) {
      at::addmm_out(product, product, left, right);
    } else {
      at::mm_out(product, left, right);
    }
  }
}

void release_gemm() { blas::brgemm_release(true); }

#define INSTANTIATE(T, A) \
  template void gemm<T, A>(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, A*, int64_t, bool);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(Half, float)
#undef INSTANTIATE

}  // namespace densenet_efficient
