#include "cuda/tape/launch_graph.h"

#include <c10/cuda/CUDAException.h>

#include <atomic>

namespace densenet_efficient::cuda {
namespace {

// Of all graphs of the process: what they take of the card's memory no allocator counts.
constexpr size_t kMostNodes = size_t{1} << 15;
std::atomic<size_t> nodes_in_use = 0;

using AddKernel = CUresult (*)(CUgraphNode*, CUgraph, const CUgraphNode*, size_t, const CUDA_KERNEL_NODE_PARAMS*);
using ChangeKernel = CUresult (*)(CUgraphExec, CUgraphNode, const CUDA_KERNEL_NODE_PARAMS*);

// Both are of CUDA 12; nullptr where the driver is older.
AddKernel add_kernel() {
  static const auto function = reinterpret_cast<AddKernel>(driver_function("cuGraphAddKernelNode", 12000));
  return function;
}
ChangeKernel change_kernel() {
  static const auto function = reinterpret_cast<ChangeKernel>(driver_function("cuGraphExecKernelNodeSetParams", 12000));
  return function;
}

// Whether a call to CUDA has worked; an error is not left for others to find.
bool is_done(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error == cudaSuccess;
}

CUDA_KERNEL_NODE_PARAMS kernel_parameters(const Launch& launch, PackedArguments& arguments) {
  CUDA_KERNEL_NODE_PARAMS parameters{};
  parameters.func = reinterpret_cast<CUfunction>(launch.kernel);
  parameters.gridDimX = launch.blocks[0];
  parameters.gridDimY = launch.blocks[1];
  parameters.gridDimZ = launch.blocks[2];
  parameters.blockDimX = launch.threads;
  parameters.blockDimY = parameters.blockDimZ = 1;
  parameters.sharedMemBytes = launch.shared_bytes;
  parameters.kernelParams = arguments.pointers();
  return parameters;
}

cudaMemsetParams zero_parameters(const Launch& launch, const Memories& memories) {
  cudaMemsetParams parameters{};
  parameters.dst = reinterpret_cast<void*>(launch.pointers.front().address.in(memories));
  parameters.elementSize = 1;
  parameters.width = launch.zero_bytes;
  parameters.height = 1;
  return parameters;
}

}  // namespace

bool LaunchGraph::has_room_for(size_t nodes) { return nodes_in_use + nodes <= kMostNodes; }

std::optional<LaunchGraph> LaunchGraph::make(const std::vector<Launch>& launches, const Memories& memories,
                                             cudaStream_t stream) {
  if (add_kernel() == nullptr || change_kernel() == nullptr) return std::nullopt;
  LaunchGraph graph(launches, memories);
  if (!graph.add_nodes() || !graph.instantiate(stream)) return std::nullopt;
  return graph;
}

LaunchGraph::LaunchGraph(const std::vector<Launch>& launches, const Memories& memories)
    : launches_(&launches), memories_(memories) {}

void LaunchGraph::DestroyExecutable::operator()(cudaGraphExec_t executable) const {
  (void)cudaGraphExecDestroy(executable);
  nodes_in_use -= nodes;
}

bool LaunchGraph::add_nodes() {
  cudaGraph_t graph = nullptr;
  if (!is_done(cudaGraphCreate(&graph, 0))) return false;
  graph_.reset(graph);
  for (const Launch& launch : *launches_) {
    const cudaGraphNode_t* before = nodes_.empty() ? nullptr : &nodes_.back();
    cudaGraphNode_t node = nullptr;
    bool is_added = false;
    if (launch.is_zeros()) {
      const cudaMemsetParams parameters = zero_parameters(launch, memories_);
      is_added = is_done(cudaGraphAddMemsetNode(&node, graph, before, before != nullptr, &parameters));
    } else {
      PackedArguments arguments(launch, memories_);
      const CUDA_KERNEL_NODE_PARAMS parameters = kernel_parameters(launch, arguments);
      is_added = add_kernel()(&node, graph, before, before != nullptr, &parameters) == CUDA_SUCCESS;
    }
    if (!is_added) return false;
    nodes_.push_back(node);
  }
  return true;
}

bool LaunchGraph::instantiate(cudaStream_t stream) {
  cudaGraphExec_t executable = nullptr;
  if (!is_done(cudaGraphInstantiateWithFlags(&executable, graph_.get(), 0))) return false;
  nodes_in_use += nodes_.size();
  executable_ = {executable, DestroyExecutable{nodes_.size()}};
  return is_done(cudaGraphUpload(executable, stream));  // takes the memory that a launch needs
}

bool LaunchGraph::move_to(const Memories& memories) {
  for (size_t index = 0; index < nodes_.size(); ++index) {
    const Launch& launch = (*launches_)[index];
    if (!launch.moves(memories_, memories)) continue;
    bool is_changed = false;
    if (launch.is_zeros()) {
      const cudaMemsetParams parameters = zero_parameters(launch, memories);
      is_changed = is_done(cudaGraphExecMemsetNodeSetParams(executable_.get(), nodes_[index], &parameters));
    } else {
      PackedArguments arguments(launch, memories);
      const CUDA_KERNEL_NODE_PARAMS parameters = kernel_parameters(launch, arguments);
      is_changed = change_kernel()(executable_.get(), nodes_[index], &parameters) == CUDA_SUCCESS;
    }
    if (!is_changed) return false;
  }
  memories_ = memories;
  return true;
}

void LaunchGraph::launch(cudaStream_t stream) const { C10_CUDA_CHECK(cudaGraphLaunch(executable_.get(), stream)); }

}  // namespace densenet_efficient::cuda
