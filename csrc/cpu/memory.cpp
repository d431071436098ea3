#include "cpu/memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <memory>
#include <mutex>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace densenet_efficient {
namespace {

// Of what is kept: smaller blocks the C library keeps itself, larger ones go back to the system, which counts at the
// peak of a step. Under the address sanitizer nothing is kept, so that it sees each block's own bounds.
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kSmallest = 1, kLargest = 0;
#else
constexpr size_t kSmallest = 1 << 18, kLargest = 1 << 25;  // bytes
#endif

// Together with the memory in use, what is kept is never more than was in use at once.
class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    // Where another thread is inside, as it may be for ever in a forked process, torch's own allocator serves.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (bytes < kSmallest || bytes > kLargest || !lock) return c10::GetCPUAllocator()->allocate(bytes);
    auto block = std::make_unique<Block>(take(bytes));
    if (block->data == nullptr) {
      most_ = std::max(most_, in_use_ + bytes);
      while (!kept_.empty() && in_use_ + bytes + kept_bytes_ > most_) let_go(std::prev(kept_.end()));
      *block = {c10::alloc_cpu(bytes), bytes};
    }
    in_use_ += block->bytes;
    most_ = std::max<size_t>(most_, in_use_);
    void* const data = block->data;
    c10::profiledCPUMemoryReporter().New(data, block->bytes);
    return {data, block.release(), &release, c10::DeviceType::CPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void let_all_go() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    while (!kept_.empty()) let_go(kept_.begin());
    most_ = in_use_;
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  // The smallest block that is large enough, and not much larger.
  Block take(size_t bytes) {
    const auto found = kept_.lower_bound(bytes);
    if (found == kept_.end() || found->first > bytes + bytes / 4) return {nullptr, 0};
    const Block block{found->second, found->first};
    kept_bytes_ -= block.bytes;
    kept_.erase(found);
    return block;
  }

  void let_go(std::multimap<size_t, void*>::iterator kept) {
    c10::free_cpu(kept->second);
    kept_bytes_ -= kept->first;
    kept_.erase(kept);
  }

  static void release(void* context);

  std::mutex mutex_;
  std::multimap<size_t, void*> kept_;  // by bytes
  size_t kept_bytes_ = 0, most_ = 0;
  std::atomic<size_t> in_use_ = 0;
};

// Never destroyed: tensors may outlive every static object.
KeptMemory& kept_memory() {
  static auto* const memory = new KeptMemory;
  return *memory;
}

void KeptMemory::release(void* context) {
  const std::unique_ptr<Block> block(static_cast<Block*>(context));
  c10::profiledCPUMemoryReporter().Delete(block->data);
  KeptMemory& memory = kept_memory();
  const std::unique_lock lock(memory.mutex_, std::try_to_lock);
  memory.in_use_ -= block->bytes;
  if (!lock) return c10::free_cpu(block->data);
  memory.kept_.emplace(block->bytes, block->data);
  memory.kept_bytes_ += block->bytes;
}

at::Tensor empty_kept_like(const at::Tensor& like, at::IntArrayRef size) { return empty_kept(size, like.options()); }

// Gives back to the system what was freed. Of itself the GNU C library keeps blocks of up to 32 MiB for as long as
// anything that lies behind them lives.
void return_freed_memory() {
  kept_memory().let_all_go();
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace

at::Tensor empty_kept(at::IntArrayRef size, const at::TensorOptions& options) {
  constexpr c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  at::Tensor tensor = at::detail::empty_generic(size, &kept_memory(), cpu, dtype, std::nullopt);
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {  // as at::empty does
    tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return tensor;
}

TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) { library.impl("empty_kept", &empty_kept_like); }

TORCH_LIBRARY_IMPL(densenet_efficient, CompositeExplicitAutograd, library) {
  library.impl("return_freed_memory", &return_freed_memory);
}

}  // namespace densenet_efficient
