// The part of CUDA C++ that the kernels use, on the host and for a C++ compiler; test only.
//
// A block's threads are fibers of one thread of the host. Between two barriers they run one after the other, each time
// in another order, so that a missing barrier shows; memory that one of them leaves unwritten is not zero by chance.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y = 1, z = 1;
};

namespace cuda_shim {

// Runs a block of ``threads``, which all call ``body``. Throws where some wait for others that have ended.
void run_block(int threads, const std::function<void()>& body);
void wait_for_block();

}  // namespace cuda_shim

inline dim3 threadIdx{0}, blockIdx{0}, blockDim{0}, gridDim{0};

inline void __syncthreads() { cuda_shim::wait_for_block(); }
