#include "cpu/kernels/bn_relu_max_pool.h"

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/dispatch.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

// Along one dimension, output i pools the inputs 2 i - 1, 2 i and 2 i + 1 that exist.
struct Range {
  int64_t begin, end;
};
Range inputs_of(int64_t output, int64_t size) {
  return {std::max<int64_t>(2 * output - 1, 0), std::min(2 * output + 2, size)};
}
Range outputs_of(int64_t input, int64_t size) { return {input / 2, std::min((input + 1) / 2 + 1, size)}; }
int64_t offset_in_window(int64_t input, int64_t output) { return input - (2 * output - 1); }

// Whether ``value`` replaces the maximum so far. torch's rule: the first of equals stays, NaN beats everything.
template <typename V>
ALWAYS_INLINE auto replaces(V value, V maximum) {
  return (value > maximum) | (value != value);
}

template <typename S>
void forward(const MaxPoolForward& p) {
  using A = Accumulate<S>;
  constexpr int64_t tile_rows = 32;
  const auto* x = static_cast<const S*>(p.x);
  const auto *scale = static_cast<const A*>(p.scale), *shift = static_cast<const A*>(p.shift);
  auto* out = static_cast<S*>(p.out);
  parallel_blocks(p.images * p.out_height * p.out_width, p.channels, tile_rows, [&](const Block& block) {
    for (int64_t output = block.row; output < block.row + block.rows; output++) {
      const int64_t image = output / (p.out_height * p.out_width);
      const Range ys = inputs_of(output / p.out_width % p.out_height, p.height);
      const Range xs = inputs_of(output % p.out_width, p.width);
      for (int64_t c = block.column; c < block.column + block.columns; c += kLanes<A>) {
        const int64_t count = block.column + block.columns - c;
        const Vector<A> a = load<A>(scale + c, count), b = load<A>(shift + c, count);
        Vector<A> maximum = broadcast<A>(-1);  // below every activation
        for (int64_t y = ys.begin; y < ys.end; y++) {
          const S* row = x + (image * p.height + y) * p.width * p.x_stride + c;
          for (int64_t i = xs.begin; i < xs.end; i++) {
            const Vector<A> value = activate(load<A>(row + i * p.x_stride, count), a, b);
            maximum = replaces(value, maximum) ? value : maximum;
          }
        }
        store(out + output * p.out_stride + c, maximum, count);
      }
    }
  });
}

// ---- backward: every input gathers from the windows that contain it, so that no two threads write to one place

constexpr int64_t kBand = 8;  // rows of outputs per task

template <typename S>
class Backward {
  using A = Accumulate<S>;
  using Index = decltype(Vector<A>{} < Vector<A>{});  // integer lanes

 public:
  explicit Backward(const MaxPoolBackward& arguments)
      : p_(arguments), vectors_(ceil_div(p_.channels, kLanes<A>)), sums_(p_.images * p_.height, p_.channels) {}

  void run() {
    const int64_t bands = ceil_div(p_.out_height, kBand);
    at::parallel_for(0, p_.images * bands, 1, [&](int64_t begin, int64_t end) {
      Scratch<Index> argmax(2 * p_.out_width * vectors_);
      for (int64_t task = begin; task < end; task++) run_band(task / bands, task % bands * kBand, argmax.get());
    });
    sums_.merge(static_cast<A*>(p_.sum_grad), static_cast<A*>(p_.sum_grad_x));
  }

 private:
  // The gradient of the input rows 2 y and 2 y + 1 of a band of output rows y, from the windows of y and y + 1.
  void run_band(int64_t image, int64_t first, Index* argmax) {
    const int64_t last = std::min(first + kBand, p_.out_height);
    find_maxima(image, first, argmax);
    for (int64_t y = first; y < last; y++) {
      if (y + 1 < p_.out_height) find_maxima(image, y + 1, argmax);
      for (int64_t input = 2 * y; input < std::min(2 * y + 2, p_.height); input++) gather_row(image, input, argmax);
    }
  }

  // Where ``argmax`` keeps the maxima of an output row: the two rows in use alternate.
  Index* maxima_of(int64_t y, Index* argmax) const { return argmax + y % 2 * p_.out_width * vectors_; }

  // The place of the maximum within every window of an output row, row-major from 0 to 8.
  void find_maxima(int64_t image, int64_t output_y, Index* argmax) const {
    Index* to = maxima_of(output_y, argmax);
    const Range ys = inputs_of(output_y, p_.height);
    for (int64_t output_x = 0; output_x < p_.out_width; output_x++) {
      const Range xs = inputs_of(output_x, p_.width);
      for (int64_t c = 0; c < p_.channels; c += kLanes<A>) {
        const int64_t count = p_.channels - c;
        const Vector<A> scale = channel(p_.scale, c), shift = channel(p_.shift, c);
        Vector<A> maximum = broadcast<A>(-1);  // below every activation
        Index place{};
        for (int64_t y = ys.begin; y < ys.end; y++) {
          for (int64_t x = xs.begin; x < xs.end; x++) {
            const Vector<A> value = activate(load<A>(x_at(image, y, x) + c, count), scale, shift);
            const Index replaced = replaces(value, maximum);
            maximum = replaced ? value : maximum;
            place = replaced ? Index{} + place_of(y, output_y, x, output_x) : place;
          }
        }
        *to++ = place;
      }
    }
  }

  // Gathers, masks and sums the gradient of an input row, and leaves scale times it in grad.
  void gather_row(int64_t image, int64_t y, Index* argmax) const {
    const int64_t row = image * p_.height + y;
    for (int64_t c = 0; c < p_.channels; c += kLanes<A>) {
      const int64_t count = p_.channels - c;
      const Vector<A> mean = channel(p_.mean, c), scale = channel(p_.scale, c), shift = channel(p_.shift, c);
      S* grad = static_cast<S*>(p_.grad) + row * p_.width * p_.grad_stride + c;
      Vector<A> sum{}, sum_x{};
      for (int64_t x = 0; x < p_.width; x++) {
        const Vector<A> value = load<A>(x_at(image, y, x) + c, count);
        const Vector<A> masked = relu_mask(value * scale + shift, gather(image, y, x, c, argmax));
        sum += masked;
        sum_x += masked * (value - mean);
        store(grad + x * p_.grad_stride, masked * scale, count);
      }
      store(sums_.sum_grad(row) + c, sum, count);
      store(sums_.sum_grad_x(row) + c, sum_x, count);
    }
  }

  // The gradient of one input: the sum over the windows whose maximum it is.
  ALWAYS_INLINE Vector<A> gather(int64_t image, int64_t y, int64_t x, int64_t c, Index* argmax) const {
    const Range ys = outputs_of(y, p_.out_height), xs = outputs_of(x, p_.out_width);
    Vector<A> gradient{};
    for (int64_t output_y = ys.begin; output_y < ys.end; output_y++) {
      const Index* maxima = maxima_of(output_y, argmax) + c / kLanes<A>;
      const S* out_grad = static_cast<const S*>(p_.out_grad) +
                          (image * p_.out_height + output_y) * p_.out_width * p_.out_grad_stride + c;
      for (int64_t output_x = xs.begin; output_x < xs.end; output_x++) {
        const Index here = maxima[output_x * vectors_] == place_of(y, output_y, x, output_x);
        const Vector<A> flow = load<A>(out_grad + output_x * p_.out_grad_stride, p_.channels - c);
        gradient += here ? flow : Vector<A>{};
      }
    }
    return gradient;
  }

  ALWAYS_INLINE const S* x_at(int64_t image, int64_t y, int64_t x) const {
    return static_cast<const S*>(p_.x) + ((image * p_.height + y) * p_.width + x) * p_.x_stride;
  }

  ALWAYS_INLINE Vector<A> channel(const void* of_channels, int64_t c) const {
    return load<A>(static_cast<const A*>(of_channels) + c, p_.channels - c);
  }

  static int place_of(int64_t y, int64_t output_y, int64_t x, int64_t output_x) {
    return static_cast<int>(3 * offset_in_window(y, output_y) + offset_in_window(x, output_x));
  }

  const MaxPoolBackward& p_;
  int64_t vectors_;  // per pixel
  TileSums<A> sums_;
};

}  // namespace

void bn_relu_max_pool(const MaxPoolForward& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { forward<S>(arguments); });
}

void bn_relu_max_pool_backward(const MaxPoolBackward& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { Backward<S>(arguments).run(); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
