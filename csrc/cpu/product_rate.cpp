#include "cpu/kernels/product_rate.h"

#include "operators.h"

namespace densenet_efficient {

double cpu_product_rate(at::ScalarType dtype, double seconds) {
  return DISPATCH_CAPABILITY(dtype, product_rate)(dtype, seconds);
}

}  // namespace densenet_efficient
