#include "cpu/memory.h"

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>

#include "cpu/pages.h"
#include "operators.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace densenet_efficient {
namespace {

// Smaller buffers the C library keeps itself. Under the address sanitizer nothing is kept, so that it sees each
// buffer's own bounds.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;
#else
constexpr bool kKeeps = true;
#endif
constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);
constexpr size_t kSmallest = 1 << 18, kCacheLine = 64;  // bytes
constexpr size_t kOffsets = 64;                         // of cache lines in a page

// Together with the memory in use, what is kept is never more than was in use at once.
class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Pages::Buffer* const buffer = take(bytes);
    if (buffer == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(buffer->data(), bytes);
    return {buffer->data() + next_offset(), buffer, &release_reported, c10::DeviceType::CPU};
  }

  // As ``allocate``, but of what no tensor holds, so that torch's profiler does not count it. What a thread takes for
  // itself the C library serves, which keeps memory for each thread.
  c10::DataPtr allocate_unreported(size_t bytes) {
    Pages::Buffer* const buffer = at::in_parallel_region() ? nullptr : take(bytes);
    if (buffer != nullptr) return {buffer->data() + next_offset(), buffer, &release_unreported, c10::DeviceType::CPU};
    void* const data = std::aligned_alloc(kCacheLine, (bytes + kCacheLine - 1) / kCacheLine * kCacheLine);
    if (data == nullptr) throw std::bad_alloc();
    return {data, data, &std::free, c10::DeviceType::CPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void let_all_go() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    most_ = in_use_;
    keep_no_more_than_most();
  }

 private:
  // Null where a small buffer is better served by the C library, or pages cannot be had.
  Pages::Buffer* take(size_t bytes) {
    if (!kKeeps || bytes < kSmallest) return nullptr;
    // Where another thread is inside, as it may be for ever in a forked process, nothing is kept.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    auto buffer = pages_.take(bytes + kOffsets * kCacheLine);
    if (!buffer) {  // what is kept may be in the way
      pages_.let_go(pages_.kept_bytes());
      buffer = pages_.take(bytes + kOffsets * kCacheLine);
    }
    if (!buffer) return nullptr;
    in_use_ += buffer->bytes();
    most_ = std::max<size_t>(most_, in_use_);
    keep_no_more_than_most();
    return new Pages::Buffer(*std::move(buffer));
  }

  void keep_no_more_than_most() {
    const size_t all = in_use_ + pages_.kept_bytes();
    if (all > most_) pages_.let_go(all - most_);
  }

  // Rows at the same place of their pages would share a few sets of the first cache.
  size_t next_offset() { return (offset_ = (offset_ + 11) % kOffsets) * kCacheLine; }

  static void release(KeptMemory& memory, void* context);
  static void release_unreported(void* context);
  static void release_reported(void* context);

  std::mutex mutex_;
  Pages pages_;
  size_t most_ = 0;
  std::atomic<size_t> in_use_ = 0, offset_ = 0;
};

// Never destroyed: tensors may outlive every static object.
KeptMemory& kept_memory() {
  static auto* const memory = new KeptMemory;
  return *memory;
}

// What a kernel takes for itself, a few MiB again and again: apart from the tensors' it stays in the last cache.
KeptMemory& kernel_memory() {
  static auto* const memory = new KeptMemory;
  return *memory;
}

void KeptMemory::release(KeptMemory& memory, void* context) {
  const std::unique_ptr<Pages::Buffer> buffer(static_cast<Pages::Buffer*>(context));
  const std::unique_lock lock(memory.mutex_, std::try_to_lock);
  memory.in_use_ -= buffer->bytes();
  if (!lock) return Pages::let_go(*buffer);
  memory.pages_.keep(std::move(*buffer));
}

void KeptMemory::release_unreported(void* context) { release(kernel_memory(), context); }

void KeptMemory::release_reported(void* context) {
  c10::profiledCPUMemoryReporter().Delete(static_cast<Pages::Buffer*>(context)->data());
  release(kept_memory(), context);
}

// As torch fills what at::empty returns.
at::Tensor filled_where_asked(at::Tensor tensor) {
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    tensor.fill_(std::numeric_limits<double>::quiet_NaN());
  }
  return tensor;
}

// Of images [N, C, ...] of any number of dimensions.
c10::DimVector channels_last_stride(at::IntArrayRef size) {
  c10::DimVector stride(size.size());
  int64_t elements = 1;
  const auto next = [&](size_t axis) {
    stride[axis] = elements;
    elements *= std::max<int64_t>(size[axis], 1);
  };
  next(1);
  for (size_t axis = size.size(); axis-- > 2;) next(axis);
  next(0);
  return stride;
}

}  // namespace

at::Tensor empty_kept_like(const at::Tensor& like, at::IntArrayRef size, bool channels_last) {
  if (!channels_last) return empty_kept(size, like.options());
  TORCH_CHECK(size.size() >= 2, "Channels come last in a size [N, C, ...] alone, got ", size);
  return empty_kept_strided(size, channels_last_stride(size), like.options());
}

// Gives back to the system what was freed, also to the GNU C library, which keeps it for as long as anything that lies
// behind it lives.
void return_freed_memory() {
  kept_memory().let_all_go();
  kernel_memory().let_all_go();
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

c10::DataPtr allocate_kept(size_t bytes) { return kernel_memory().allocate_unreported(bytes); }

at::Tensor empty_kept(at::IntArrayRef size, const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  return filled_where_asked(at::detail::empty_generic(size, &kept_memory(), kCpu, dtype, std::nullopt));
}

at::Tensor empty_kept_strided(at::IntArrayRef size, at::IntArrayRef stride, const at::TensorOptions& options) {
  const auto dtype = c10::typeMetaToScalarType(options.dtype());
  return filled_where_asked(at::detail::empty_strided_generic(size, stride, &kept_memory(), kCpu, dtype));
}

}  // namespace densenet_efficient
