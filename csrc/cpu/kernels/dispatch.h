// From the run-time dtype to the compile-time types of a kernel.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <type_traits>

#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Whether this capability has kernels of its own for storage type S, as kernel_capability chooses between them.
#if defined(CPU_CAPABILITY_AMX)
template <typename S>
constexpr bool kServes = std::is_same_v<S, BFloat16> || std::is_same_v<S, Half>;
#elif defined(CPU_CAPABILITY_AVX512_BF16)
template <typename S>
constexpr bool kServes = std::is_same_v<S, BFloat16>;
#else
template <typename S>
constexpr bool kServes = true;
#endif

// The type of a product's operands for activations of storage type S: S itself where this capability multiplies it.
#if defined(CPU_CAPABILITY_AVX512_BF16)
template <typename S>
using Operand = S;
#else
template <typename S>
using Operand = Accumulate<S>;
#endif

// Calls function.template operator()<S>() with the storage type S.
template <typename Function>
void dispatch_storage(c10::ScalarType dtype, Function function) {
  const auto call = [&]<typename S>() {
    if constexpr (kServes<S>) {
      function.template operator()<S>();
    } else {
      TORCH_INTERNAL_ASSERT(false, dtype, " is another capability's to serve");
    }
  };
  switch (dtype) {
    case c10::kFloat:
      return call.template operator()<float>();
    case c10::kDouble:
      return call.template operator()<double>();
    case c10::kBFloat16:
      return call.template operator()<BFloat16>();
    case c10::kHalf:
      return call.template operator()<Half>();
    default:
      TORCH_CHECK_TYPE(false, "densenet_efficient: expected float32, float64, bfloat16 or float16, got ", dtype);
  }
}

// Calls function.template operator()<S, T>() with the storage type S and the type T of a matrix product's operands.
template <typename Function>
void dispatch_product(c10::ScalarType dtype, Function function) {
  dispatch_storage(dtype, [&]<typename S>() { function.template operator()<S, Operand<S>>(); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
