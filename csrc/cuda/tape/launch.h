// One recorded launch: a kernel of the driver's, or zeros, with addresses to be filled in.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace densenet_efficient::cuda {

// The addresses at which the memories of a launch begin, by their index.
using Memories = std::vector<uintptr_t>;

struct Address {
  int64_t memory;
  int64_t displacement;  // in bytes

  uintptr_t in(const Memories& memories) const { return memories[memory] + displacement; }
};

struct Launch {
  struct Pointer {
    size_t offset;  // in the arguments
    Address address;
  };

  uintptr_t kernel = 0;  // 0: zeros
  std::array<unsigned, 3> blocks{};
  unsigned threads = 0;
  unsigned shared_bytes = 0;
  std::string arguments;          // one after the other, without the pointers
  std::vector<size_t> offsets;    // of each argument
  std::vector<Pointer> pointers;  // of zeros, the one address
  size_t zero_bytes = 0;

  bool is_zeros() const { return kernel == 0; }
  // The arguments with their pointers.
  std::string arguments_in(const Memories& memories) const;
  // Whether a pointer of it lies in a memory that has moved.
  bool moves(const Memories& from, const Memories& to) const;
};

// A kernel's arguments as the driver takes them.
class PackedArguments {
 public:
  PackedArguments(const Launch& launch, const Memories& memories);

  void** pointers() { return pointers_.data(); }

 private:
  std::string packed_;
  std::vector<void*> pointers_;
};

// A function of the driver by its name, which the extension is not linked with; nullptr where the driver lacks it.
void* driver_function(const char* name, int version);

// Launches one after the other.
void launch_all(const std::vector<Launch>& launches, const Memories& memories, cudaStream_t stream);

}  // namespace densenet_efficient::cuda
