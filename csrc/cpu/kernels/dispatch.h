// From the run-time dtype to the compile-time types of a kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "cpu/gemm.h"
#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Calls function.template operator()<S>() with the storage type S.
template <typename Function>
void dispatch_storage(c10::ScalarType dtype, Function function) {
  switch (dtype) {
    case c10::kFloat:
      return function.template operator()<float>();
    case c10::kDouble:
      return function.template operator()<double>();
    case c10::kBFloat16:
      return function.template operator()<BFloat16>();
    case c10::kHalf:
      return function.template operator()<Half>();
    default:
      TORCH_CHECK_TYPE(false, "densenet_efficient: expected float32, float64, bfloat16 or float16, got ", dtype);
  }
}

// Calls function.template operator()<S, T>() with the storage type S and the type T of a matrix product's operands.
template <typename Function>
void dispatch_product(c10::ScalarType dtype, Function function) {
  dispatch_storage(dtype, [&]<typename S>() {
    if constexpr (std::is_same_v<S, BFloat16>) {
      if (multiplies_bfloat16()) return function.template operator()<S, BFloat16>();
      return function.template operator()<S, float>();
    } else if constexpr (std::is_same_v<S, Half>) {
      if (multiplies_half()) return function.template operator()<S, Half>();
      return function.template operator()<S, float>();
    } else {
      return function.template operator()<S, S>();
    }
  });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
