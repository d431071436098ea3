// Launches of kernels, recorded once and repeated on other tensors: what Python decides a thousand times in a step is
// decided once, and a repetition costs what the driver takes. Unlike a CUDA graph it holds no memory between two of
// them, and takes every tensor as a new address.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace densenet_efficient::cuda {

class LaunchTape {
 public:
  // The memories of a repetition are, in this order: its scratch, the tensors that it is given, its results.
  struct Address {
    int64_t memory;
    int64_t displacement;  // in bytes
  };

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
  std::optional<std::vector<at::Tensor>> repeat(const std::vector<at::Tensor>& given) const;

  // What each kernel is launched with where the memories begin at these addresses; for tests.
  std::vector<std::string> arguments_at(const std::vector<uintptr_t>& memories) const;

 private:
  struct Pointer {
    size_t offset;
    Address address;
  };
  struct Launch {
    uintptr_t kernel;  // 0: zeros
    std::array<unsigned, 3> blocks;
    unsigned threads;
    unsigned shared_bytes;
    std::string arguments;
    std::vector<size_t> offsets;
    std::vector<Pointer> pointers;  // of zeros, the one address
    size_t bytes;                   // of zeros
  };
  struct Result {
    at::ScalarType dtype;
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;
    int64_t offset;    // of its first element in its storage
    int64_t elements;  // of its storage
  };

  // A kernel's arguments, with its pointers into memories that begin at these addresses.
  static void put_arguments(const Launch& launch, const std::vector<uintptr_t>& memories, char* arguments);
  at::Tensor new_result(const Result& result, const at::Tensor& like) const;
  bool are_aligned(const std::vector<at::Tensor>& given) const;

  int64_t scratch_bytes_;
  std::vector<uintptr_t> misalignments_;  // of each given tensor, to 16 bytes
  std::vector<Result> results_;
  std::vector<Launch> launches_;
  size_t most_argument_bytes_ = 0;
};

// Whether a kernel takes arguments of just these offsets and sizes; true where the driver is too old to say.
bool kernel_takes(uintptr_t kernel, const std::vector<std::array<size_t, 2>>& arguments);

// All of tensors but their addresses: equal for tensors of equal dtype, device, sizes and strides.
std::string layout_of(const std::vector<at::Tensor>& tensors);

void define_launch_tape(pybind11::module_& module);

}  // namespace densenet_efficient::cuda
