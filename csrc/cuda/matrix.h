// What the host hands to the kernels: plain pointers, strides in elements.
#pragma once

#include <cstdint>

namespace densenet_efficient::cuda {

// A row-major matrix with unit column stride; T is void or const void.
template <typename T>
struct Matrix {
  T* data;
  int64_t stride;

  // Whether its rows can be read and written in pieces of 16 bytes.
  bool is_aligned(int64_t element_size) const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * element_size % 16 == 0;
  }
};

}  // namespace densenet_efficient::cuda
