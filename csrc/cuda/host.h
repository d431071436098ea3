// What every host function of the CUDA operators does around a launch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <limits>

#include "checks.h"
#include "cuda/matrix.h"

namespace densenet_efficient::cuda {

// Calls launch(stream) on the device and current stream of ``like``, and checks that it was accepted.
template <typename Launch>
void launch_for(const at::Tensor& like, Launch launch) {
  const c10::cuda::CUDAGuard guard(like.device());
  launch(c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// The same, with memory for the partial results of two stages: launch(partials, stream).
template <typename Launch>
void launch_with_partials(const at::Tensor& like, int64_t size, Launch launch) {
  const at::Tensor partials = like.new_empty({size}, accumulation_dtype(like));
  launch_for(like, [&](cudaStream_t stream) { launch(partials.data_ptr(), stream); });
}

inline Matrix<const void> matrix_of(const at::Tensor& matrix) { return {matrix.const_data_ptr(), matrix.stride(0)}; }
inline Matrix<void> mutable_matrix_of(const at::Tensor& matrix) { return {matrix.data_ptr(), matrix.stride(0)}; }

inline void check_storage_dtype(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
                   "densenet_efficient: expected float32, float64, bfloat16 or float16, got ", dtype);
}

// The kernels that look at pixels count them in 32 bits; elements are counted in 64.
inline void check_pixels(const at::Tensor& matrix) {
  TORCH_CHECK(matrix.size(0) <= std::numeric_limits<int32_t>::max(), "x must have at most 2^31 - 1 pixels, got ",
              matrix.size(0));
}

}  // namespace densenet_efficient::cuda
