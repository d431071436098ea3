// The matrix product of a tile, and the memory that its successor needs, asked for meanwhile.
//
// oneDNN's micro-kernels run at the peak on data in cache, but nothing else can run beside them: the next tile's misses
// then cost as much again as 15 to 30 % of the product. So where this project's own micro-kernels are as fast (AVX2 and
// AVX-512 in float32, AVX-512 BF16 and AMX in bfloat16) they are used, and they spread prefetches over their
// multiplications.
#pragma once

#include <limits>

#include "cpu/gemm.h"
#include "cpu/kernels/multiply_amx.h"
#include "cpu/kernels/multiply_vectors.h"
#include "cpu/kernels/prefetch.h"
#include "cpu/kernels/product.h"

namespace densenet_efficient::CPU_CAPABILITY {

// The rows and the depth that a product runs best in multiples of; a tile that is its own to fill is rounded up to it.
#if defined(CPU_CAPABILITY_AMX)
template <typename T>
constexpr int64_t kProductRows = std::is_same_v<T, BFloat16> ? detail::kTileRows : 1;
template <typename T>
constexpr int64_t kProductDepth = std::is_same_v<T, BFloat16> ? detail::kTileDepth
                                  : kPairedRows<T>            ? 2
                                                              : 1;
#else
template <typename T>
constexpr int64_t kProductRows = 1;
template <typename T>
constexpr int64_t kProductDepth = kPairedRows<T> ? 2 : 1;
#endif

// The columns of a strip of B, where B is packed for a product: what the micro-kernel takes at a time, so that it reads
// on and on. Whole rows where that is not known, or was not measured to be faster.
#if defined(CPU_CAPABILITY_AVX2)
template <typename T>
constexpr int64_t kStripColumns =
    std::is_same_v<T, float> ? 2 * detail::kRegister : std::numeric_limits<int64_t>::max();
#else
template <typename T>
constexpr int64_t kStripColumns = std::numeric_limits<int64_t>::max();
#endif

// Whether rows of A may overlap: torch's products do not take them.
template <typename T>
constexpr bool kOverlappingRows =
#if defined(CPU_CAPABILITY_AVX512_BF16)
    std::is_same_v<T, BFloat16>;
#elif defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    std::is_same_v<T, float>;
#else
    false;
#endif

// While a thread multiplies operands of type T: AMX tiles are a state of the CPU.
template <typename T>
class Multiplying {
 public:
  Multiplying() {
#if defined(CPU_CAPABILITY_AMX)
    if constexpr (std::is_same_v<T, BFloat16>) detail::configure_tiles();
#endif
  }
  ~Multiplying() {
#if defined(CPU_CAPABILITY_AMX)
    if constexpr (std::is_same_v<T, BFloat16>) {
      _tile_release();
      return;
    }
#endif
    if constexpr (std::is_same_v<T, Half>) release_gemm();
  }
  Multiplying(const Multiplying&) = delete;
  Multiplying& operator=(const Multiplying&) = delete;
};

// Computes ``p``, asking for the lines of ``prefetch`` meanwhile where it can; within the life of a Multiplying<T>.
template <typename T, typename A>
void multiply(const Product<T, A>& p, Prefetch& prefetch);

}  // namespace densenet_efficient::CPU_CAPABILITY
