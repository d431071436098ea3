#include "cpu/kernels/product_rate.h"

#include <torch/library.h>

namespace densenet_efficient {
namespace {

double measured_rate(at::ScalarType dtype, double seconds) {
  return DISPATCH_CAPABILITY(dtype, product_rate)(dtype, seconds);
}

}  // namespace

// No tensor goes in, so that there is no device to dispatch on.
TORCH_LIBRARY_IMPL(densenet_efficient, CompositeExplicitAutograd, library) {
  library.impl("cpu_product_rate", &measured_rate);
}

}  // namespace densenet_efficient
