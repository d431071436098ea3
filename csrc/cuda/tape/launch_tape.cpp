#include "cuda/tape/launch_tape.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/accumulate.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <iterator>
#include <utility>

namespace densenet_efficient::cuda {
namespace {

namespace py = pybind11;

constexpr uintptr_t kAlignment = 16;  // as far as Triton's kernels look at a pointer's
// Steps may take their memory by turns, as where a loss lives on until the next one.
constexpr size_t kMostGraphs = 3;

using ParameterInfo = CUresult (*)(CUfunction, size_t, size_t*, size_t*);

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
  std::vector<Launch::Pointer> places;
  for (const auto& [offset, memory, displacement] : pointers) {
    places.push_back({static_cast<size_t>(offset), {memory, displacement}});
  }
  launches_.push_back({kernel, blocks, threads, shared_bytes, arguments, offsets, places, 0});
}

void LaunchTape::add_zeros(int64_t memory, int64_t displacement, int64_t bytes) {
  Launch zeros;
  zeros.pointers.push_back({0, {memory, displacement}});
  zeros.zero_bytes = static_cast<size_t>(bytes);
  launches_.push_back(zeros);
}

bool LaunchTape::are_aligned(const std::vector<at::Tensor>& given) const {
  for (size_t index = 0; index < given.size(); ++index) {
    if (reinterpret_cast<uintptr_t>(given[index].const_data_ptr()) % kAlignment != misalignments_[index]) return false;
  }
  return true;
}

at::Tensor LaunchTape::new_result(const Result& result, const at::Tensor& like) const {
  const auto options = like.options().dtype(result.dtype);
  const bool is_whole = c10::multiply_integers(result.sizes) == result.elements;
  if (is_whole) return at::empty_strided(result.sizes, result.strides, options);
  return at::empty({result.elements}, options).as_strided(result.sizes, result.strides, result.offset);
}

std::optional<std::vector<at::Tensor>> LaunchTape::repeat(const std::vector<at::Tensor>& given) {
  TORCH_CHECK(given.size() == misalignments_.size(), "expected ", misalignments_.size(), " tensors, got ",
              given.size());
  if (!are_aligned(given)) return std::nullopt;
  const c10::cuda::CUDAGuard guard(given.front().device());
  C10_CUDA_CHECK(cudaSetDevice(given.front().get_device()));  // for the driver, a thread needs the device's context
  const at::Tensor scratch = at::empty({scratch_bytes_}, given.front().options().dtype(at::kByte));
  std::vector<at::Tensor> results;
  for (const Result& result : results_) results.push_back(new_result(result, given.front()));

  Memories memories{reinterpret_cast<uintptr_t>(scratch.data_ptr())};
  // What a kernel only reads is given too; none of it is marked as written, for no copy on write takes part.
  for (const at::Tensor& tensor : given) memories.push_back(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()));
  for (const at::Tensor& result : results) {
    memories.push_back(reinterpret_cast<uintptr_t>(result.storage().mutable_data()));
  }
  launch(memories, c10::cuda::getCurrentCUDAStream().stream());
  return results;
}

void LaunchTape::launch(const Memories& memories, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex_);  // of another thread's repetition the memories are others
  const LaunchGraph* graph = graph_at(memories, stream);
  if (graph != nullptr) {
    graph->launch(stream);
  } else {
    launch_all(launches_, memories, stream);
  }
}

LaunchGraph* LaunchTape::graph_at(const Memories& memories, cudaStream_t stream) {
  const bool is_captured = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  if (is_captured) return nullptr;  // into a graph that is being captured no other can be launched
  if (++repetitions_ < next_try_) return nullptr;
  auto found = std::find_if(graphs_.begin(), graphs_.end(),
                            [&](const LaunchGraph& graph) { return graph.memories() == memories; });
  if (found == graphs_.end()) {
    const bool has_room = LaunchGraph::has_room_for(launches_.size());
    if (graphs_.empty() && !has_room) return nullptr;  // for now
    bool is_made = false;
    if (has_room && graphs_.size() < kMostGraphs) {
      std::optional<LaunchGraph> graph = LaunchGraph::make(launches_, memories, stream);
      is_made = graph.has_value();
      if (is_made) found = graphs_.insert(found, std::move(*graph));
    } else {
      found = std::prev(found);
      is_made = found->move_to(memories);
    }
    if (!is_made) {  // a full card has room again, or another thread's capture ends: later, and ever more rarely
      next_try_ = 2 * repetitions_;
      graphs_.clear();
      return nullptr;
    }
  }
  graphs_.splice(graphs_.begin(), graphs_, found);
  return &graphs_.front();
}

size_t LaunchTape::graphs() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return graphs_.size();
}

std::vector<std::string> LaunchTape::arguments_at(const Memories& memories) const {
  std::vector<std::string> all;
  for (const Launch& launch : launches_) all.push_back(launch.arguments_in(memories));
  return all;
}

bool kernel_takes(uintptr_t kernel, const std::vector<std::array<size_t, 2>>& arguments) {
  static const auto info = reinterpret_cast<ParameterInfo>(driver_function("cuFuncGetParamInfo", 12040));
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
      .def_property_readonly("graphs", &LaunchTape::graphs)
      .def("arguments_at", [as_bytes](const LaunchTape& tape, const std::vector<uintptr_t>& memories) {
        return as_bytes(tape.arguments_at(memories));
      });
  module.def("kernel_takes", &kernel_takes);
  module.def("layout_of", [](const std::vector<at::Tensor>& tensors) { return py::bytes(layout_of(tensors)); });
}

}  // namespace densenet_efficient::cuda
