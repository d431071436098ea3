// Loops over registers whose number is known at run time alone.
#pragma once

#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Calls function.template operator()<V>() with V = count, of Least to Most in steps.
template <int Least, int Most, int Step, typename Function>
ALWAYS_INLINE void with_registers(int64_t count, Function function) {
  if constexpr (Most > Least) {
    if (count < Most) return with_registers<Least, Most - Step, Step>(count, function);
  }
  function.template operator()<Most>();
}

}  // namespace densenet_efficient::CPU_CAPABILITY
