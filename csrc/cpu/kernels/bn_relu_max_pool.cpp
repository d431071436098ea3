#include "cpu/kernels/bn_relu_max_pool.h"

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/dispatch.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

// Along one dimension, output i pools the inputs 2 i - 1, 2 i and 2 i + 1 that exist.
struct Range {
  int64_t begin, end;
};
// The inputs of an output, relative to 2 * output.
Range inputs_of(int64_t output, int64_t size) {
  return {output == 0 ? 0 : -1, std::min<int64_t>(2, size - 2 * output)};
}
Range outputs_of(int64_t input, int64_t size) { return {input / 2, std::min((input + 1) / 2 + 1, size)}; }

// The maximum of a window, and its place: 0 to 8, row-major.
template <typename A>
struct Maximum {
  using Place = decltype(Vector<A>{} < Vector<A>{});  // integer lanes

  Vector<A> value = broadcast<A>(-1);  // below every activation
  Place place{};

  // torch's rule: the first of equals stays, as stored; NaN beats everything.
  ALWAYS_INLINE void take(Vector<A> candidate, Place candidate_place) {
    const Place wins = (candidate > value) | (candidate != candidate);
    value = wins ? candidate : value;
    place = wins ? candidate_place : place;
  }
};

// The matrix x as images, with the coefficients of the batch norm.
template <typename S>
struct Images {
  using A = Accumulate<S>;

  const S* x;
  int64_t stride, height, width, channels;
  const A *scale, *shift;

  template <typename Arguments>
  explicit Images(const Arguments& p)
      : x(static_cast<const S*>(p.x)),
        stride(p.x_stride),
        height(p.height),
        width(p.width),
        channels(p.channels),
        scale(static_cast<const A*>(p.scale)),
        shift(static_cast<const A*>(p.shift)) {}

  const S* pixel(int64_t image, int64_t y, int64_t x_position) const {
    return x + ((image * height + y) * width + x_position) * stride;
  }

  // Calls function(c, Maximum) for the channels [begin, end) of the window of an output.
  template <typename Function>
  ALWAYS_INLINE void pool(int64_t image, int64_t output_y, int64_t output_x, int64_t begin, int64_t end,
                          Function function) const {
    const S* center = pixel(image, 2 * output_y, 2 * output_x);
    const Range ys = inputs_of(output_y, height), xs = inputs_of(output_x, width);
    int64_t c = begin;
    if (ys.end - ys.begin == 3 && xs.end - xs.begin == 3) {  // nearly always: constants, which unroll
      for (; c + kLanes<A> <= end; c += kLanes<A>) function(c, maximum(center, {-1, 2}, {-1, 2}, c, kLanes<A>));
    }
    for (; c < end; c += kLanes<A>) function(c, maximum(center, ys, xs, c, end - c));
  }

 private:
  using Place = typename Maximum<A>::Place;

  ALWAYS_INLINE Maximum<A> maximum(const S* center, Range ys, Range xs, int64_t c, int64_t count) const {
    const Vector<A> a = load<A>(scale + c, count), b = load<A>(shift + c, count);
    Maximum<A> result;  // of the maxima of the rows, which do not wait for each other
#pragma GCC unroll 3
    for (int64_t y = ys.begin; y < ys.end; y++) {
      const S* row = center + y * width * stride + c;
      Maximum<A> of_row;
#pragma GCC unroll 3
      for (int64_t i = xs.begin; i < xs.end; i++) {
        const int place = static_cast<int>(3 * (y + 1) + i + 1);
        of_row.take(rounded<S>(activate(load<A>(row + i * stride, count), a, b)), Place{} + place);
      }
      result.take(of_row.value, of_row.place);
    }
    return result;
  }
};

template <typename S>
void forward(const MaxPoolForward& p) {
  using A = Accumulate<S>;
  constexpr int64_t tile_rows = 32;
  const Images<S> images(p);
  parallel_blocks(p.images * p.out_height * p.out_width, p.channels, tile_rows, [&](const Block& block) {
    for (int64_t output = block.row; output < block.row + block.rows; output++) {
      const int64_t image = output / (p.out_height * p.out_width), y = output / p.out_width % p.out_height;
      S* out = static_cast<S*>(p.out) + output * p.out_stride;
      images.pool(image, y, output % p.out_width, block.column, block.column + block.columns,
                  [&](int64_t c, const Maximum<A>& maximum) {
                    store(out + c, maximum.value, block.column + block.columns - c);
                  });
    }
  });
}

// ---- backward: every input gathers from the windows that contain it, so that no two threads write to one place

constexpr int64_t kBand = 8;  // rows of outputs per task

template <typename S>
class Backward {
  using A = Accumulate<S>;
  using Place = typename Maximum<A>::Place;

 public:
  explicit Backward(const MaxPoolBackward& arguments)
      : p_(arguments),
        images_(arguments),
        vectors_(ceil_div(p_.channels, kLanes<A>)),
        sums_(p_.images * p_.height, p_.channels) {}

  void run() {
    const int64_t bands = ceil_div(p_.out_height, kBand);
    at::parallel_for(0, p_.images * bands, 1, [&](int64_t begin, int64_t end) {
      Scratch<Place> places(2 * p_.out_width * vectors_);
      for (int64_t task = begin; task < end; task++) run_band(task / bands, task % bands * kBand, places.get());
    });
    sums_.merge(0, p_.channels, p_.sum_grad, p_.sum_grad_x);
  }

 private:
  // The gradient of the input rows 2 y and 2 y + 1 of a band of output rows y, from the windows of y and y + 1.
  void run_band(int64_t image, int64_t first, Place* places) {
    const int64_t last = std::min(first + kBand, p_.out_height);
    find_maxima(image, first, places_of(first, places));
    for (int64_t y = first; y < last; y++) {
      if (y + 1 < p_.out_height) find_maxima(image, y + 1, places_of(y + 1, places));
      for (int64_t input = 2 * y; input < std::min(2 * y + 2, p_.height); input++) gather_row(image, input, places);
    }
  }

  // Where the maxima of an output row are kept: the two rows in use alternate.
  Place* places_of(int64_t output_y, Place* places) const { return places + output_y % 2 * p_.out_width * vectors_; }

  void find_maxima(int64_t image, int64_t output_y, Place* places) const {
    for (int64_t x = 0; x < p_.out_width; x++) {
      images_.pool(image, output_y, x, 0, p_.channels,
                   [&](int64_t, const Maximum<A>& maximum) { *places++ = maximum.place; });
    }
  }

  // A row of windows, and the place that an input row has in them.
  struct WindowRow {
    const Place* places;
    const S* out_grad;
    int place;
  };

  // Gathers, masks and sums the gradient of an input row, and leaves scale times it in grad.
  void gather_row(int64_t image, int64_t y, Place* places) const {
    WindowRow windows[2];
    int count = 0;
    const Range outputs = outputs_of(y, p_.out_height);
    for (int64_t output_y = outputs.begin; output_y < outputs.end; output_y++) {
      const int64_t output = (image * p_.out_height + output_y) * p_.out_width;
      windows[count++] = {places_of(output_y, places), static_cast<const S*>(p_.out_grad) + output * p_.out_grad_stride,
                          static_cast<int>(3 * (y - 2 * output_y + 1))};
    }
    const int64_t lanes = kLanes<A>;
    int64_t c = 0;
    for (; c + lanes <= p_.channels; c += lanes) gather_columns(windows, count, image, y, c, lanes);
    if (c < p_.channels) gather_columns(windows, count, image, y, c, p_.channels - c);
  }

  // The same for the channels [c, c + lanes) of the row.
  ALWAYS_INLINE void gather_columns(const WindowRow* windows, int count, int64_t image, int64_t y, int64_t c,
                                    int64_t lanes) const {
    const int64_t row = image * p_.height + y, width = p_.width, stride = p_.x_stride, grad_stride = p_.grad_stride;
    const Vector<A> mean = load<A>(static_cast<const A*>(p_.mean) + c, lanes);
    const Vector<A> scale = load<A>(images_.scale + c, lanes), shift = load<A>(images_.shift + c, lanes);
    const S* from = images_.pixel(image, y, 0) + c;
    S* grad = static_cast<S*>(p_.grad) + row * width * grad_stride + c;
    Vector<A> sum{}, sum_x{};
    for (int64_t x = 0; x < width; x++) {
      const Vector<A> value = load<A>(from + x * stride, lanes);
      Vector<A> gradient{};
      for (int i = 0; i < count; i++) gradient += gather(windows[i], x, c, lanes);
      const Vector<A> masked = relu_mask(affine(value, scale, shift), gradient);
      sum += masked;
      sum_x += masked * (value - mean);
      store(grad + x * grad_stride, masked * scale, lanes);
    }
    store(sums_.sum_grad(row) + c, sum, lanes);
    store(sums_.sum_grad_x(row) + c, sum_x, lanes);
  }

  // What an input receives from a row of windows: the gradients of those whose maximum it is.
  ALWAYS_INLINE Vector<A> gather(const WindowRow& windows, int64_t x, int64_t c, int64_t lanes) const {
    const int64_t left = x / 2;
    if (x % 2 == 0) return flow(windows, left, 1, c, lanes);
    const Vector<A> gradient = flow(windows, left, 2, c, lanes);
    return left + 1 < p_.out_width ? gradient + flow(windows, left + 1, 0, c, lanes) : gradient;
  }

  ALWAYS_INLINE Vector<A> flow(const WindowRow& windows, int64_t output_x, int column, int64_t c, int64_t lanes) const {
    const Place here = windows.places[output_x * vectors_ + c / kLanes<A>] == windows.place + column;
    const Vector<A> out_grad = load<A>(windows.out_grad + output_x * p_.out_grad_stride + c, lanes);
    return here ? out_grad : Vector<A>{};
  }

  const MaxPoolBackward& p_;
  Images<S> images_;
  int64_t vectors_;  // per pixel
  PartialSums<A> sums_;
};

}  // namespace

void bn_relu_max_pool(const MaxPoolForward& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { forward<S>(arguments); });
}

void bn_relu_max_pool_backward(const MaxPoolBackward& arguments) {
  dispatch_storage(arguments.dtype, [&]<typename S>() { Backward<S>(arguments).run(); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
