// From what is known at run time to the compile-time constants of a kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace densenet_efficient::cuda {

// The type in which values of storage type S are computed with and summed.
template <typename S>
using Accumulate = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The largest number that storage type S rounds to zero: half of its smallest, which ties to even.
template <typename S>
constexpr Accumulate<S> kZero = 0;
template <>
constexpr float kZero<c10::BFloat16> = 0x1p-134f;
template <>
constexpr float kZero<c10::Half> = 0x1p-25f;

// Calls function.template operator()<S>() with the storage type S; the host has checked that it is one of these.
template <typename Function>
void dispatch_storage(c10::ScalarType dtype, Function function) {
  if (dtype == c10::ScalarType::Double) return function.template operator()<double>();
  if (dtype == c10::ScalarType::BFloat16) return function.template operator()<c10::BFloat16>();
  if (dtype == c10::ScalarType::Half) return function.template operator()<c10::Half>();
  function.template operator()<float>();
}

// Calls function.template operator()<S, kAligned>() with the storage type S, and whether every matrix can be accessed
// in pieces of 16 bytes.
template <typename Function, typename... Matrices>
void dispatch(c10::ScalarType dtype, int64_t columns, Function function, const Matrices&... matrices) {
  dispatch_storage(dtype, [&]<typename S>() {
    constexpr int64_t size = sizeof(S);
    if (columns * size % 16 == 0 && (matrices.is_aligned(size) && ...)) return function.template operator()<S, true>();
    function.template operator()<S, false>();
  });
}

}  // namespace densenet_efficient::cuda
