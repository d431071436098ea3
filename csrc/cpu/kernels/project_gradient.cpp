#include "cpu/kernels/project_gradient.h"

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/dispatch.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kTileRows = 64;

template <typename S>
void project(const ProjectGradient& p) {
  using A = Accumulate<S>;
  parallel_blocks(p.rows, p.channels, kTileRows, [&](const Block& block) {
    const S* x = static_cast<const S*>(p.x) + block.row * p.x_stride;
    S* grad = static_cast<S*>(p.grad) + block.row * p.grad_stride;
    for (int64_t c = block.column; c < block.column + block.columns; c += kLanes<A>) {
      const int64_t count = block.column + block.columns - c;
      const Vector<A> mean = load<A>(static_cast<const A*>(p.mean) + c, count);
      const Vector<A> slope = load<A>(static_cast<const A*>(p.slope) + c, count);
      const Vector<A> offset = load<A>(static_cast<const A*>(p.offset) + c, count);
      for (int64_t r = 0; r < block.rows; r++) {
        S* to = grad + r * p.grad_stride + c;
        const Vector<A> value = load<A>(x + r * p.x_stride + c, count);
        store(to, projected(load<A>(to, count), value, mean, slope, offset), count);
      }
    }
  });
}

}  // namespace

void project_gradient(const ProjectGradient& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { project<S>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
