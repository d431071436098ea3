// Preloaded: an allocation of a tensor, or within the native extension, fails when the countdown reaches it.
// What oneDNN allocates for itself is left out: it does not survive a failure, whoever calls it.
#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> countdown;  // 0: none fails
std::atomic<bool> failed;

// Whether the allocation asked for by the code at ``caller``, in a library of one of ``names``, is the one to fail.
template <typename... Names>
bool fails_now(const void* caller, Names... names) {
  if (countdown <= 0) return false;
  Dl_info library;
  if (!dladdr(caller, &library) || !(std::strstr(library.dli_fname, names) || ...)) return false;
  if (countdown.fetch_sub(1) != 1) return false;
  failed = true;
  return true;
}

}  // namespace

extern "C" {

void fail_at(long index) {
  failed = false;
  countdown = index;
}

int has_failed() { return failed; }

int posix_memalign(void** pointer, size_t alignment, size_t size) {  // a tensor
  static const auto real = reinterpret_cast<int (*)(void**, size_t, size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  return fails_now(__builtin_return_address(0), "libc10") ? ENOMEM : real(pointer, alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) {  // the scratch of a kernel
  static const auto real = reinterpret_cast<void* (*)(size_t, size_t)>(dlsym(RTLD_NEXT, "aligned_alloc"));
  return fails_now(__builtin_return_address(0), "/_C.") ? nullptr : real(alignment, size);
}
}

void* operator new(size_t size) {  // a list of tensors, partial sums
  void* memory = fails_now(__builtin_return_address(0), "/_C.") ? nullptr : std::malloc(size > 0 ? size : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
