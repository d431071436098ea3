#include "cpu/kernels/bn_relu_avg_pool.h"

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/dispatch.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kTileRows = 64;

// The pixel of x where the window of this output begins.
int64_t window_origin(const AvgPoolForward& p, int64_t output) {
  const int64_t rows = p.height / p.window_height, columns = p.width / p.window_width;
  const int64_t image = output / (rows * columns), y = output / columns % rows, x = output % columns;
  return (image * p.height + y * p.window_height) * p.width + x * p.window_width;
}

// out [columns] = mean of relu(x * scale + shift) over a window; summed row by row, which keeps float sums short.
template <typename S, typename A>
void pool_window(const AvgPoolForward& p, const S* x, const A* scale, const A* shift, int64_t columns, S* out) {
  const A size = static_cast<A>(p.window_height * p.window_width);
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const int64_t count = columns - c;
    const Vector<A> a = load<A>(scale + c, count), b = load<A>(shift + c, count);
    Vector<A> total{};
    for (int64_t y = 0; y < p.window_height; y++) {
      const S* row = x + y * p.width * p.x_stride + c;
      Vector<A> sum{};
      for (int64_t i = 0; i < p.window_width; i++) sum += activate(load<A>(row + i * p.x_stride, count), a, b);
      total += sum;
    }
    store(out + c, total / size, count);
  }
}

template <typename S>
void forward(const AvgPoolForward& p) {
  using A = Accumulate<S>;
  const auto* x = static_cast<const S*>(p.x);
  const auto *scale = static_cast<const A*>(p.scale), *shift = static_cast<const A*>(p.shift);
  auto* out = static_cast<S*>(p.out);
  const int64_t outputs = p.images * (p.height / p.window_height) * (p.width / p.window_width);
  const int64_t tile_rows = ceil_div(kTileRows, p.window_height * p.window_width);
  parallel_blocks(outputs, p.channels, tile_rows, [&](const Block& block) {
    const int64_t c = block.column;
    for (int64_t output = block.row; output < block.row + block.rows; output++) {
      pool_window(p, x + window_origin(p, output) * p.x_stride + c, scale + c, shift + c, block.columns,
                  out + output * p.out_stride + c);
    }
  });
}

// ---- backward

// The output whose window contains this pixel of x; -1 where none does.
int64_t output_of(const AvgPoolBackward& p, int64_t pixel) {
  const int64_t rows = p.height / p.window_height, columns = p.width / p.window_width;
  const int64_t image = pixel / (p.height * p.width), y = pixel / p.width % p.height / p.window_height,
                x = pixel % p.width / p.window_width;
  return y < rows && x < columns ? (image * rows + y) * columns + x : -1;
}

template <typename S>
class Backward {
  using A = Accumulate<S>;

 public:
  explicit Backward(const AvgPoolBackward& arguments)
      : p_(arguments),
        rows_(p_.images * p_.height * p_.width),
        sums_(ceil_div(rows_, kTileRows), p_.channels),
        zeros_(p_.channels) {
    std::fill_n(zeros_.get(), p_.channels, S(0));
  }

  void run() {
    parallel_blocks(rows_, p_.channels, kTileRows, [&](const Block& block) { run_block(block); });
    sums_.merge(0, p_.channels, p_.sum_grad, p_.sum_grad_x);
  }

 private:
  void run_block(const Block& block) {
    const S* out_grad[kTileRows];  // what flows into each row of the block
    for (int64_t r = 0; r < block.rows; r++) {
      const int64_t output = output_of(p_, block.row + r);
      out_grad[r] = output < 0 ? zeros_.get() : static_cast<const S*>(p_.out_grad) + output * p_.out_grad_stride;
    }
    for (int64_t c = block.column; c < block.column + block.columns; c += kLanes<A>) {
      deposit(out_grad, block, c, block.column + block.columns - c);
    }
  }

  // Masks the gradient of a block's columns from ``c``, takes its sums, and leaves scale times it in grad.
  void deposit(const S* const* out_grad, const Block& block, int64_t c, int64_t count) {
    const Vector<A> mean = load<A>(static_cast<const A*>(p_.mean) + c, count);
    const Vector<A> scale = load<A>(static_cast<const A*>(p_.scale) + c, count);
    const Vector<A> shift = load<A>(static_cast<const A*>(p_.shift) + c, count);
    const S* x = static_cast<const S*>(p_.x) + block.row * p_.x_stride + c;
    S* grad = p_.grad ? static_cast<S*>(p_.grad) + block.row * p_.grad_stride + c : nullptr;
    const A size = static_cast<A>(p_.window_height * p_.window_width);
    Vector<A> sum{}, sum_x{};
    for (int64_t r = 0; r < block.rows; r++) {
      const Vector<A> value = load<A>(x + r * p_.x_stride, count);
      const Vector<A> masked = relu_mask(affine(value, scale, shift), load<A>(out_grad[r] + c, count) / size);
      sum += masked;
      sum_x += masked * (value - mean);
      if (grad) {
        S* to = grad + r * p_.grad_stride;
        const Vector<A> before = p_.accumulate ? load<A>(to, count) : Vector<A>{};
        store(to, before + masked * scale, count);
      }
    }
    store(sums_.sum_grad(block.tile) + c, sum, count);
    store(sums_.sum_grad_x(block.tile) + c, sum_x, count);
  }

  const AvgPoolBackward& p_;
  int64_t rows_;
  PartialSums<A> sums_;
  Scratch<S> zeros_;  // the gradient of a pixel outside every window
};

}  // namespace

void bn_relu_avg_pool(const AvgPoolForward& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { forward<S>(arguments); });
}

void bn_relu_avg_pool_backward(const AvgPoolBackward& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { Backward<S>(arguments).run(); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
