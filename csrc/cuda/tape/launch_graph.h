// A CUDA graph of many launches, one after the other: launched in the time of a few kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda/tape/launch.h"

namespace densenet_efficient::cuda {

class LaunchGraph {
 public:
  // Whether the graphs of the process may have so many nodes more.
  static bool has_room_for(size_t nodes);
  // Of ``launches``, which outlive it, with these memories; nothing where CUDA makes no graph of them.
  static std::optional<LaunchGraph> make(const std::vector<Launch>& launches, const Memories& memories,
                                         cudaStream_t stream);

  const Memories& memories() const { return memories_; }
  // The same with other memories, for what is launched from now on; false where CUDA does not change it.
  bool move_to(const Memories& memories);
  void launch(cudaStream_t stream) const;

 private:
  struct Destroy {
    void operator()(cudaGraph_t graph) const { (void)cudaGraphDestroy(graph); }
  };
  struct DestroyExecutable {
    size_t nodes;
    void operator()(cudaGraphExec_t executable) const;
  };

  LaunchGraph(const std::vector<Launch>& launches, const Memories& memories);
  bool add_nodes();
  bool instantiate(cudaStream_t stream);

  const std::vector<Launch>* launches_;
  Memories memories_;
  std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, Destroy> graph_;  // its nodes name those of the executable
  std::vector<cudaGraphNode_t> nodes_;
  std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, DestroyExecutable> executable_;
};

}  // namespace densenet_efficient::cuda
