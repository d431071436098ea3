// How fast this CPU multiplies matrices that stay in its first caches: the roof over every convolution.
#pragma once

#include <c10/core/ScalarType.h>

#include "cpu/capability.h"

namespace densenet_efficient {

// FLOP/s of all threads together, over about ``seconds``, for the operands that storage of ``dtype`` has.
DECLARE_KERNEL(double product_rate(c10::ScalarType dtype, double seconds);)

}  // namespace densenet_efficient
