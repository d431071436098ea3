// The gradient of activations, of those alone that are not zero: a ReLU takes away what flows into the others.
#pragma once

#include "cpu/kernels/multiply_activations.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Depths of which a row can be kept at hand.
inline bool may_mask(int64_t depth) { return may_skip(depth) && depth <= 192; }

// C [rows, columns] = A [rows, depth] @ B^T [columns, depth] where an activation is not zero, else zero; C has 64
// columns, of which those from ``columns`` on receive anything. At most 128 rows; a depth that may_mask().
struct MaskedProduct {
  int64_t rows, columns, depth;
  const float* activations;
  int64_t activations_stride;
  const float* a;
  int64_t a_stride;
  const float* b;
  float* c;
  int64_t c_stride;
};

// Asks for the lines of ``prefetch`` meanwhile.
void multiply_masked(const MaskedProduct& p, Prefetch& prefetch);

}  // namespace densenet_efficient::CPU_CAPABILITY
