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
#include <mutex>
#include <new>
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

class KeptMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    Buffer* const buffer = take(bytes);
    if (buffer == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(buffer->addresses.begin, bytes);
    return {buffer->addresses.begin + next_offset(), buffer, &release_reported, c10::DeviceType::CPU};
  }

  // As ``allocate``, but of what no tensor holds, so that torch's profiler does not count it. What a thread takes for
  // itself the C library serves, which keeps memory for each thread.
  c10::DataPtr allocate_unreported(size_t bytes) {
    Buffer* const buffer = at::in_parallel_region() ? nullptr : take(bytes);
    if (buffer != nullptr) {
      return {buffer->addresses.begin + next_offset(), buffer, &release, c10::DeviceType::CPU};
    }
    void* const data = std::aligned_alloc(kCacheLine, (bytes + kCacheLine - 1) / kCacheLine * kCacheLine);
    if (data == nullptr) throw std::bad_alloc();
    return {data, data, &std::free, c10::DeviceType::CPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void let_all_go() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return;
    collect_freed();
    pages_.let_all_go();
  }

 private:
  struct Buffer {
    AddressRange addresses;
    KeptMemory& memory;
    Buffer* next = nullptr;  // of those that are freed
  };

  // Null where a small buffer is better served by the C library, or pages cannot be had.
  Buffer* take(size_t bytes) {
    if (!kKeeps || bytes < kSmallest) return nullptr;
    // Where another thread is inside, as it may be for ever in a forked process, nothing is kept.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    collect_freed();
    const AddressRange addresses = pages_.take(bytes + kOffsets * kCacheLine);
    return addresses.bytes() == 0 ? nullptr : new Buffer{addresses, *this};
  }

  void collect_freed() {
    Buffer* buffer = freed_.exchange(nullptr);
    while (buffer != nullptr) {
      pages_.keep(buffer->addresses);
      delete std::exchange(buffer, buffer->next);
    }
  }

  // Rows at the same place of their pages would share a few sets of the first cache.
  size_t next_offset() { return (offset_ = (offset_ + 11) % kOffsets) * kCacheLine; }

  // Never waits for a thread that is inside.
  static void release(void* context) {
    auto* const buffer = static_cast<Buffer*>(context);
    auto& freed = buffer->memory.freed_;
    buffer->next = freed.load();
    while (!freed.compare_exchange_weak(buffer->next, buffer)) {
    }
  }

  static void release_reported(void* context) {
    c10::profiledCPUMemoryReporter().Delete(static_cast<Buffer*>(context)->addresses.begin);
    release(context);
  }

  std::mutex mutex_;
  Pages pages_;
  std::atomic<Buffer*> freed_ = nullptr;
  std::atomic<size_t> offset_ = 0;
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
