#include "cuda/launch_tape.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/accumulate.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>

namespace densenet_efficient::cuda {
namespace {

namespace py = pybind11;

constexpr uintptr_t kAlignment = 16;  // as far as Triton's kernels look at a pointer's
constexpr int kDriverVersion = 12000;

// A function of the driver by its name, which the extension is not linked with; nullptr where the driver lacks it.
template <typename Function>
Function driver_function(const char* name, int version = kDriverVersion) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(name, &function, static_cast<unsigned>(version), cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    (void)cudaGetLastError();
    return nullptr;
  }
  return reinterpret_cast<Function>(function);
}

using LaunchKernel = CUresult (*)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                  CUstream, void**, void**);
using ParameterInfo = CUresult (*)(CUfunction, size_t, size_t*, size_t*);

LaunchKernel launch_kernel() {
  static const auto function = driver_function<LaunchKernel>("cuLaunchKernel");
  TORCH_CHECK(function != nullptr, "the NVIDIA driver offers no cuLaunchKernel of CUDA 12; install a newer one");
  return function;
}

}  // namespace

LaunchTape::LaunchTape(int64_t scratch_bytes, const std::vector<at::Tensor>& given) : scratch_bytes_(scratch_bytes) {
  for (const at::Tensor& tensor : given) {
    misalignments_.push_back(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment);
  }
}

void LaunchTape::add_result(const at::Tensor& result) {
  const auto elements = static_cast<int64_t>(result.storage().nbytes() / result.element_size());
  results_.push_back(
      {result.scalar_type(), result.sizes().vec(), result.strides().vec(), result.storage_offset(), elements});
}

void LaunchTape::add_launch(uintptr_t kernel, std::array<unsigned, 3> blocks, unsigned threads, unsigned shared_bytes,
                            const std::string& arguments, const std::vector<size_t>& offsets,
                            const std::vector<std::array<int64_t, 3>>& pointers) {
  std::vector<Pointer> places;
  for (const auto& [offset, memory, displacement] : pointers) {
    places.push_back({static_cast<size_t>(offset), {memory, displacement}});
  }
  launches_.push_back({kernel, blocks, threads, shared_bytes, arguments, offsets, places, 0});
  most_argument_bytes_ = std::max(most_argument_bytes_, arguments.size());
}

void LaunchTape::add_zeros(int64_t memory, int64_t displacement, int64_t bytes) {
  launches_.push_back({0, {}, 0, 0, {}, {}, {{0, {memory, displacement}}}, static_cast<size_t>(bytes)});
}

bool LaunchTape::are_aligned(const std::vector<at::Tensor>& given) const {
  for (size_t index = 0; index < given.size(); ++index) {
    if (reinterpret_cast<uintptr_t>(given[index].const_data_ptr()) % kAlignment != misalignments_[index]) return false;
  }
  return true;
}

void LaunchTape::put_arguments(const Launch& launch, const std::vector<uintptr_t>& memories, char* arguments) {
  std::memcpy(arguments, launch.arguments.data(), launch.arguments.size());
  for (const auto& [offset, address] : launch.pointers) {
    const uintptr_t value = memories[address.memory] + address.displacement;
    std::memcpy(arguments + offset, &value, sizeof(value));
  }
}

at::Tensor LaunchTape::new_result(const Result& result, const at::Tensor& like) const {
  const auto options = like.options().dtype(result.dtype);
  const bool is_whole = c10::multiply_integers(result.sizes) == result.elements;
  if (is_whole) return at::empty_strided(result.sizes, result.strides, options);
  return at::empty({result.elements}, options).as_strided(result.sizes, result.strides, result.offset);
}

std::optional<std::vector<at::Tensor>> LaunchTape::repeat(const std::vector<at::Tensor>& given) const {
  TORCH_CHECK(given.size() == misalignments_.size(), "expected ", misalignments_.size(), " tensors, got ",
              given.size());
  if (!are_aligned(given)) return std::nullopt;
  const c10::cuda::CUDAGuard guard(given.front().device());
  C10_CUDA_CHECK(cudaSetDevice(given.front().get_device()));  // for the driver, a thread needs the device's context
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream().stream();
  const at::Tensor scratch = at::empty({scratch_bytes_}, given.front().options().dtype(at::kByte));
  std::vector<at::Tensor> results;
  for (const Result& result : results_) results.push_back(new_result(result, given.front()));

  std::vector<uintptr_t> memories{reinterpret_cast<uintptr_t>(scratch.data_ptr())};
  // What a kernel only reads is given too; none of it is marked as written, for no copy on write takes part.
  for (const at::Tensor& tensor : given) memories.push_back(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()));
  for (const at::Tensor& result : results) {
    memories.push_back(reinterpret_cast<uintptr_t>(result.storage().mutable_data()));
  }

  std::vector<std::max_align_t> buffer(most_argument_bytes_ / sizeof(std::max_align_t) + 1);
  char* arguments = reinterpret_cast<char*>(buffer.data());
  std::vector<void*> pointers;
  for (const Launch& launch : launches_) {
    if (launch.kernel == 0) {
      const Address& place = launch.pointers.front().address;
      const uintptr_t address = memories[place.memory] + place.displacement;
      C10_CUDA_CHECK(cudaMemsetAsync(reinterpret_cast<void*>(address), 0, launch.bytes, stream));
      continue;
    }
    put_arguments(launch, memories, arguments);
    pointers.clear();
    for (const size_t offset : launch.offsets) pointers.push_back(arguments + offset);
    const auto& [x, y, z] = launch.blocks;
    const CUresult error = launch_kernel()(reinterpret_cast<CUfunction>(launch.kernel), x, y, z, launch.threads, 1, 1,
                                           launch.shared_bytes, stream, pointers.data(), nullptr);
    TORCH_CHECK(error == CUDA_SUCCESS, "a recorded kernel could not be launched: error ", static_cast<int>(error),
                " of the CUDA driver");
  }
  return results;
}

std::vector<std::string> LaunchTape::arguments_at(const std::vector<uintptr_t>& memories) const {
  std::vector<std::string> all;
  for (const Launch& launch : launches_) {
    std::string arguments(launch.arguments.size(), '\0');
    if (launch.kernel != 0) put_arguments(launch, memories, arguments.data());
    all.push_back(arguments);
  }
  return all;
}

bool kernel_takes(uintptr_t kernel, const std::vector<std::array<size_t, 2>>& arguments) {
  static const auto info = driver_function<ParameterInfo>("cuFuncGetParamInfo", 12040);
  if (info == nullptr) return true;
  const auto function = reinterpret_cast<CUfunction>(kernel);
  size_t offset = 0, size = 0;
  for (size_t index = 0; index < arguments.size(); ++index) {
    if (info(function, index, &offset, &size) != CUDA_SUCCESS) return false;
    if (offset != arguments[index][0] || size != arguments[index][1]) return false;
  }
  return info(function, arguments.size(), &offset, &size) != CUDA_SUCCESS;
}

std::string layout_of(const std::vector<at::Tensor>& tensors) {
  std::vector<int64_t> layout;
  for (const at::Tensor& tensor : tensors) {
    layout.insert(layout.end(), {static_cast<int64_t>(tensor.scalar_type()), tensor.device().index(), tensor.dim()});
    layout.insert(layout.end(), tensor.sizes().begin(), tensor.sizes().end());
    layout.insert(layout.end(), tensor.strides().begin(), tensor.strides().end());
  }
  return {reinterpret_cast<const char*>(layout.data()), layout.size() * sizeof(int64_t)};
}

void define_launch_tape(py::module_& module) {
  const auto as_bytes = [](const std::vector<std::string>& strings) {
    py::list list;
    for (const std::string& string : strings) list.append(py::bytes(string));
    return list;
  };
  py::class_<LaunchTape>(module, "LaunchTape")
      .def(py::init<int64_t, const std::vector<at::Tensor>&>(), py::arg("scratch_bytes"), py::arg("given"))
      .def("add_result", &LaunchTape::add_result)
      .def("add_launch", &LaunchTape::add_launch, py::arg("kernel"), py::arg("blocks"), py::arg("threads"),
           py::arg("shared_bytes"), py::arg("arguments"), py::arg("offsets"), py::arg("pointers"))
      .def("add_zeros", &LaunchTape::add_zeros, py::arg("memory"), py::arg("displacement"), py::arg("bytes"))
      .def("repeat", &LaunchTape::repeat, py::call_guard<py::gil_scoped_release>())
      .def("arguments_at", [as_bytes](const LaunchTape& tape, const std::vector<uintptr_t>& memories) {
        return as_bytes(tape.arguments_at(memories));
      });
  module.def("kernel_takes", &kernel_takes);
  module.def("layout_of", [](const std::vector<at::Tensor>& tensors) { return py::bytes(layout_of(tensors)); });
}

}  // namespace densenet_efficient::cuda
