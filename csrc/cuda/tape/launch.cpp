#include "cuda/tape/launch.h"

#include <c10/cuda/CUDAException.h>

#include <algorithm>
#include <cstring>

namespace densenet_efficient::cuda {
namespace {

using LaunchKernel = CUresult (*)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                  CUstream, void**, void**);

LaunchKernel launch_kernel() {
  static const auto function = reinterpret_cast<LaunchKernel>(driver_function("cuLaunchKernel", 12000));
  TORCH_CHECK(function != nullptr, "the NVIDIA driver offers no cuLaunchKernel of CUDA 12; install a newer one");
  return function;
}

}  // namespace

std::string Launch::arguments_in(const Memories& memories) const {
  std::string packed = arguments;
  if (is_zeros()) return packed;
  for (const auto& [offset, address] : pointers) {
    const uintptr_t value = address.in(memories);
    std::memcpy(packed.data() + offset, &value, sizeof(value));
  }
  return packed;
}

bool Launch::moves(const Memories& from, const Memories& to) const {
  return std::any_of(pointers.begin(), pointers.end(), [&](const Pointer& pointer) {
    return from[pointer.address.memory] != to[pointer.address.memory];
  });
}

PackedArguments::PackedArguments(const Launch& launch, const Memories& memories)
    : packed_(launch.arguments_in(memories)) {
  for (const size_t offset : launch.offsets) pointers_.push_back(packed_.data() + offset);
}

void* driver_function(const char* name, int version) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, static_cast<unsigned>(version), cudaEnableDefault, &found);
  if (error == cudaSuccess && found == cudaDriverEntryPointSuccess) return function;
  (void)cudaGetLastError();
  return nullptr;
}

void launch_all(const std::vector<Launch>& launches, const Memories& memories, cudaStream_t stream) {
  for (const Launch& launch : launches) {
    if (launch.is_zeros()) {
      void* begin = reinterpret_cast<void*>(launch.pointers.front().address.in(memories));
      C10_CUDA_CHECK(cudaMemsetAsync(begin, 0, launch.zero_bytes, stream));
      continue;
    }
    const auto& [x, y, z] = launch.blocks;
    PackedArguments arguments(launch, memories);
    const CUresult error = launch_kernel()(reinterpret_cast<CUfunction>(launch.kernel), x, y, z, launch.threads, 1, 1,
                                           launch.shared_bytes, stream, arguments.pointers(), nullptr);
    TORCH_CHECK_WITH(OutOfMemoryError, error != CUDA_ERROR_OUT_OF_MEMORY,
                     "CUDA out of memory. A recorded kernel could not be launched; use a smaller batch");
    TORCH_CHECK(error == CUDA_SUCCESS, "a recorded kernel could not be launched: error ", static_cast<int>(error),
                " of the CUDA driver");
  }
}

}  // namespace densenet_efficient::cuda
