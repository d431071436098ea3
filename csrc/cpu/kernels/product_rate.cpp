#include "cpu/kernels/product_rate.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <chrono>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

using Clock = std::chrono::steady_clock;

template <typename S, typename T>
double rate(double seconds) {
  using A = Accumulate<S>;
  constexpr int64_t rows = kProductRows<T> > 1 ? 64 : 72, columns = 64, depth = 128, products_between_looks = 64;
  std::atomic<int64_t> products{0};
  const auto begin = Clock::now();
  const auto end = begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    Scratch<T> left(rows * depth), right(depth * columns);
    Scratch<A> product(rows * columns);
    std::fill_n(left.get(), rows * depth, T(1));
    std::fill_n(right.get(), depth * columns, T(1));
    Prefetch nothing;
    const Multiplying<T> multiplying;
    int64_t done = 0;
    while (Clock::now() < end) {
      for (int64_t i = 0; i < products_between_looks; i++, done++) {
        multiply(Product<T, A>{.rows = rows,
                               .columns = columns,
                               .depth = depth,
                               .a = left.get(),
                               .a_stride = depth,
                               .b = right.get(),
                               .b_stride = columns,
                               .c = product.get(),
                               .c_stride = columns},
                 nothing);
      }
    }
    products += done;
  });
  const double elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  return 2.0 * rows * columns * depth * static_cast<double>(products) / elapsed;
}

}  // namespace

double product_rate(c10::ScalarType dtype, double seconds) {
  double flops = 0;
  dispatch_product(dtype, [&]<typename S, typename T>() { flops = rate<S, T>(seconds); });
  return flops;
}

}  // namespace densenet_efficient::CPU_CAPABILITY
