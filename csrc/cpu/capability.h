// The CPU capabilities that the kernels (csrc/cpu/kernels) are compiled for, and the choice between them at
// run time.
#pragma once

#include <c10/core/ScalarType.h>

#include <array>
#include <cstddef>
#include <string>
#include <vector>

// Every kernel exists once in each of these namespaces, in ascending order; the flags stand in setup.py.
#if defined(WITH_CPU_CAPABILITY_AMX)
#define FOR_EACH_CPU_CAPABILITY(apply, ...)                                                                       \
  apply(DEFAULT, __VA_ARGS__) apply(AVX2, __VA_ARGS__) apply(AVX512, __VA_ARGS__) apply(AVX512_BF16, __VA_ARGS__) \
      apply(AMX, __VA_ARGS__)
#else
#define FOR_EACH_CPU_CAPABILITY(apply, ...) apply(DEFAULT, __VA_ARGS__)
#endif

// Declares, within `namespace densenet_efficient`, a kernel that a source in csrc/cpu/kernels defines within
// `namespace densenet_efficient::CPU_CAPABILITY`:
//   DECLARE_KERNEL(void copy(const float* x, int64_t size, float* out);)
#define DECLARE_KERNEL(...) FOR_EACH_CPU_CAPABILITY(DECLARE_KERNEL_IN, __VA_ARGS__)
#define DECLARE_KERNEL_IN(capability, ...) \
  namespace capability {                   \
  __VA_ARGS__                              \
  }

// The declared kernel that serves activations of a dtype: DISPATCH_CAPABILITY(dtype, copy)(x, size, out)
#define DISPATCH_CAPABILITY(dtype, ...)  \
  (::std::array{FOR_EACH_CPU_CAPABILITY( \
      KERNEL_POINTER_IN, __VA_ARGS__)}[static_cast<::std::size_t>(::densenet_efficient::kernel_capability(dtype))])
#define KERNEL_POINTER_IN(capability, ...) &::densenet_efficient::capability::__VA_ARGS__,

namespace densenet_efficient {

enum class Capability : std::size_t { DEFAULT, AVX2, AVX512, AVX512_BF16, AMX };

// The capability in use, chosen once: the one that the environment variable DENSENET_EFFICIENT_CPU_CAPABILITY
// names, else the best that this CPU supports. Raises ValueError for an unknown name, RuntimeError for one
// that this CPU does not support.
Capability cpu_capability();

// The capability whose kernels serve activations of ``dtype``: beyond AVX-512 there are only those whose products have
// operands of 16 bits.
Capability kernel_capability(c10::ScalarType dtype);

// "default", "avx2", "avx512", "avx512_bf16" or "amx".
std::string cpu_capability_name();

// The names of all capabilities in this build, in ascending order.
std::vector<std::string> compiled_cpu_capabilities();

}  // namespace densenet_efficient
