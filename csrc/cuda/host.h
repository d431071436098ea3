// What every host function of the CUDA operators does around a launch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>

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

// Pixels are counted in 32 bits, elements in 64. As many as end, with the tile that the last of them begins, below
// 2^31: Triton's convolutions come after these kernels.
constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 11);

inline void check_pixels(const at::Tensor& matrix) {
  TORCH_CHECK(matrix.size(0) <= kMostPixels, "x must have at most ", kMostPixels, " pixels, got ", matrix.size(0),
              "; use a smaller batch");
}

}  // namespace densenet_efficient::cuda
