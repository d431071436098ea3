// Stands in for csrc/cuda/kernels/launch.cuh: a launch is a loop over the blocks; test only.
#pragma once

#include <cuda_runtime.h>

namespace densenet_efficient::cuda {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t, Arguments... arguments) {
  gridDim = {static_cast<unsigned>(blocks)};
  blockDim = {static_cast<unsigned>(threads)};
  for (int64_t block = 0; block < blocks; block++) {
    blockIdx = {static_cast<unsigned>(block)};
    cuda_shim::run_block(threads, [&] { kernel(arguments...); });
  }
}

}  // namespace densenet_efficient::cuda
