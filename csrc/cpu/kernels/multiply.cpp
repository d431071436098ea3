#include "cpu/kernels/multiply.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

template <typename T, typename A>
void multiply_by_torch(const Product<T, A>& p) {
  for (int64_t segment = 0; segment < p.segments; segment++) {
    gemm(p.rows, p.columns, p.depth, p.a + segment * p.a_segment, p.a_stride, p.b + segment * p.b_segment, p.b_stride,
         p.c, p.c_stride, p.accumulate || segment > 0);
  }
}

}  // namespace

template <typename T, typename A>
void multiply(const Product<T, A>& p, [[maybe_unused]] Prefetch& prefetch) {
#if defined(CPU_CAPABILITY_AMX)
  if constexpr (std::is_same_v<T, BFloat16>) {
    detail::multiply_with_tiles(p, prefetch);
  } else {
    multiply_by_torch(p);
  }
#elif defined(CPU_CAPABILITY_AVX512_BF16)
  detail::multiply<detail::BFloat16Step>(p, prefetch);
#elif defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    detail::multiply<detail::FloatStep>(p, prefetch);
  } else {
    multiply_by_torch(p);
  }
#else
  multiply_by_torch(p);
#endif
}

// Here alone, for the micro-kernels of all block shapes take longer to compile than the kernels that call them.
#if defined(CPU_CAPABILITY_AVX512_BF16)
template void multiply(const Product<BFloat16, float>& p, Prefetch& prefetch);
#else
template void multiply(const Product<float, float>& p, Prefetch& prefetch);
template void multiply(const Product<double, double>& p, Prefetch& prefetch);
#endif
#if defined(CPU_CAPABILITY_AMX)
template void multiply(const Product<Half, float>& p, Prefetch& prefetch);
#endif

}  // namespace densenet_efficient::CPU_CAPABILITY
