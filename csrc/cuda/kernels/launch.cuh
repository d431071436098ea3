// The launch of a kernel: the only place that no C++ compiler understands.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace densenet_efficient::cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream, Arguments... arguments) {
  if (blocks > 0) kernel<<<dim3(static_cast<unsigned>(blocks)), threads, 0, stream>>>(arguments...);
}

}  // namespace densenet_efficient::cuda
