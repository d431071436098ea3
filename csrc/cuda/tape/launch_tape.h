// Launches of kernels, recorded once and repeated on other tensors: what Python decides a thousand times in a step is
// decided once. Unlike a CUDA graph of its own a repetition holds no memory between two of them, and takes every tensor
// as a new address. It is launched as a graph all the same, of which those launches are changed whose memory has moved:
// few or none, for a training step takes most of its memory where the step before it had it.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "cuda/tape/launch.h"
#include "cuda/tape/launch_graph.h"

namespace densenet_efficient::cuda {

class LaunchTape {
 public:
  // The memories of a repetition are, in this order: its scratch, the tensors that it is given, its results.
  // ``scratch_bytes`` of memory for one repetition; ``given`` are tensors as it will be given, in number and alignment.
  LaunchTape(int64_t scratch_bytes, const std::vector<at::Tensor>& given);

  // Each repetition makes a tensor like this one, with a storage of its own.
  void add_result(const at::Tensor& result);

  // A kernel: its arguments one after the other as ``arguments`` holds them, each from its offset on; those that are
  // pointers are put in: pointers[i] is (offset, memory, displacement).
  void add_launch(uintptr_t kernel, std::array<unsigned, 3> blocks, unsigned threads, unsigned shared_bytes,
                  const std::string& arguments, const std::vector<size_t>& offsets,
                  const std::vector<std::array<int64_t, 3>>& pointers);

  // Zeros in ``bytes`` from an address on.
  void add_zeros(int64_t memory, int64_t displacement, int64_t bytes);

  // The results, once everything is launched on the current stream of the tensors' device. Nothing where a tensor is
  // aligned otherwise than the kernels were compiled for.
  std::optional<std::vector<at::Tensor>> repeat(const std::vector<at::Tensor>& given);

  // How many graphs there are.
  size_t graphs() const;

  // What each kernel is launched with where the memories begin at these addresses; for tests.
  std::vector<std::string> arguments_at(const Memories& memories) const;

 private:
  struct Result {
    at::ScalarType dtype;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int64_t offset;    // of its first element in its storage
    int64_t elements;  // of its storage
  };

  at::Tensor new_result(const Result& result, const at::Tensor& like) const;
  bool are_aligned(const std::vector<at::Tensor>& given) const;
  void launch(const Memories& memories, cudaStream_t stream);
  // The graph with these memories, now the latest; nullptr where there is none, and each launch is one by itself.
  LaunchGraph* graph_at(const Memories& memories, cudaStream_t stream);

  int64_t scratch_bytes_;
  std::vector<uintptr_t> misalignments_;  // of each given tensor, to 16 bytes
  std::vector<Result> results_;
  std::vector<Launch> launches_;
  mutable std::mutex mutex_;       // of what follows
  std::list<LaunchGraph> graphs_;  // the latest first
  size_t repetitions_ = 0;
  size_t next_try_ = 2;  // the repetition that may have a graph; a layout may not come back after its first
};

// Whether a kernel takes arguments of just these offsets and sizes; true where the driver is too old to say.
bool kernel_takes(uintptr_t kernel, const std::vector<std::array<size_t, 2>>& arguments);

// All of tensors but their addresses: equal for tensors of equal dtype, device, sizes and strides.
std::string layout_of(const std::vector<at::Tensor>& tensors);

void define_launch_tape(pybind11::module_& module);

}  // namespace densenet_efficient::cuda
