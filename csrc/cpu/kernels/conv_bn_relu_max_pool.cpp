#include "cpu/kernels/conv_bn_relu_max_pool.h"

#include <optional>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/tasks.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kMostRows = 32;  // of outputs per task: the row of the convolution above them is computed twice

// The convolution's weight as the right operands of its products, one per row of the kernel: [kernel width * channels]
// rows of [outputs], and rows of zeros behind them up to a depth that products run well in.
template <typename S, typename T>
class Weight {
  using A = Accumulate<S>;

 public:
  explicit Weight(const ConvMaxPoolForward& p)
      : taps_(p.kernel[1] * p.channels),
        depth_(round_up(taps_, kProductDepth<T>)),
        outputs_(p.outputs),
        packed_(p.kernel[0] * depth_ * outputs_) {
    const Scratch<A> rows(depth_ * outputs_);
    std::fill_n(rows.get() + taps_ * outputs_, (depth_ - taps_) * outputs_, A(0));
    for (int64_t y = 0; y < p.kernel[0]; y++) {
      for (int64_t tap = 0; tap < taps_; tap++) {
        const S* from = static_cast<const S*>(p.weight) + tap % p.channels * p.weight_stride[1] +
                        y * p.weight_stride[2] + tap / p.channels * p.weight_stride[3];
        A* row = rows.get() + tap * outputs_;
        for (int64_t output = 0; output < outputs_; output++) row[output] = from[output * p.weight_stride[0]];
      }
      pack_gathered(depth_, outputs_, packed_.get() + y * depth_ * outputs_,
                    [&](int64_t row) { return rows.get() + row * outputs_; });
    }
  }

  const T* packed() const { return packed_.get(); }
  int64_t taps() const { return taps_; }
  int64_t depth() const { return depth_; }

 private:
  int64_t taps_, depth_, outputs_;
  Scratch<T> packed_;
};

// Rows of an image between columns of padding, pixel after pixel: what one row of the kernel sees of a pixel lies there
// as one row of a product's left operand, which overlaps the next one.
template <typename S, typename T>
class PaddedRows {
  using A = Accumulate<S>;

 public:
  PaddedRows(const ConvMaxPoolForward& p, int64_t most_rows, int64_t reach)
      : p_(p), stride_((p.width + 2 * p.padding[1]) * p.channels), reach_(reach), data_(most_rows * stride_ + reach) {}

  int64_t stride() const { return stride_; }
  const T* row(int64_t index) const { return data_.get() + index * stride_; }

  // Takes ``count`` rows of an image, some of which may lie in its padding, and zeros that products read behind them.
  void take(int64_t image, int64_t first, int64_t count) const {
    for (int64_t row = 0; row < count; row++) take_row(image, first + row, data_.get() + row * stride_);
    std::fill_n(data_.get() + count * stride_, reach_, T(0));
  }

  bool are_finite(int64_t count) const {
    Vector<A> sum{};  // zero, or NaN
    const int64_t size = count * stride_;
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const Vector<A> value = load<A>(data_.get() + i, size - i);
      sum += value - value;
    }
    for (int64_t lane = 0; lane < kLanes<A>; lane++) {
      if (sum[lane] != 0) return false;
    }
    return true;
  }

 private:
  void take_row(int64_t image, int64_t y, T* to) const {
    if (y < 0 || y >= p_.height) return void(std::fill_n(to, stride_, T(0)));
    const S* from = static_cast<const S*>(p_.x) + image * p_.x_stride[0] + y * p_.x_stride[2];
    const int64_t padding = p_.padding[1] * p_.channels, size = p_.width * p_.channels;
    std::fill_n(to, padding, T(0));
    std::fill_n(to + padding + size, padding, T(0));
    to += padding;
    if (p_.x_stride[1] == 1 && p_.x_stride[3] == p_.channels) {
      for (int64_t i = 0; i < size; i += kLanes<A>) store(to + i, load<A>(from + i, size - i), size - i);
      return;
    }
    for (int64_t x = 0; x < p_.width; x++) {
      for (int64_t c = 0; c < p_.channels; c++) {
        to[x * p_.channels + c] = static_cast<T>(from[c * p_.x_stride[1] + x * p_.x_stride[3]]);
      }
    }
  }

  const ConvMaxPoolForward& p_;
  int64_t stride_, reach_;
  Scratch<T> data_;
};

// The larger one; NaN beats everything.
template <typename V>
ALWAYS_INLINE V larger(V left, V right) {
  return (left > right) | (left != left) ? left : right;
}

// What one thread computes, in memory of its own.
template <typename S, typename T>
class Bands {
  using A = Accumulate<S>;

 public:
  Bands(const ConvMaxPoolForward& p, const Weight<S, T>& weight, int64_t most_rows)
      : p_(p),
        weight_(weight),
        rows_(p, rows_of(p, std::min(2 * most_rows + 1, p.conv_height)), weight.depth()),
        conv_row_(p.conv_width * p.outputs),
        pooled_rows_(3 * pooled_size()) {}

  // The output's rows [begin, end) of an image.
  void run(int64_t image, int64_t begin, int64_t end) {
    const int64_t first = std::max<int64_t>(2 * begin - 1, 0), last = std::min(2 * end, p_.conv_height);
    const int64_t taken = rows_of(p_, last - first);
    rows_.take(image, first * p_.stride[0] - p_.padding[0], taken);
    overlap_ = kOverlappingRows<T> && (weight_.depth() == weight_.taps() || rows_.are_finite(taken));
    const auto pool = [&](int64_t y, A* to) { pool_columns(rows_.row((y - first) * p_.stride[0]), to); };
    A *above = pooled_rows_.get(), *center = above + pooled_size(), *below = center + pooled_size();
    if (begin > 0) pool(first, above);
    for (int64_t y = begin; y < end; y++) {
      pool(2 * y, center);
      const bool has_below = 2 * y + 1 < p_.conv_height;
      if (has_below) pool(2 * y + 1, below);
      write(image, y, y > 0 ? above : center, center, has_below ? below : center);
      std::swap(above, below);
    }
  }

 private:
  // Of an image, those that ``conv_rows`` of the convolution see. These must exist: where there is one alone, a stride
  // may be far beyond the image.
  static int64_t rows_of(const ConvMaxPoolForward& p, int64_t conv_rows) {
    return (conv_rows - 1) * p.stride[0] + p.kernel[0];
  }

  int64_t pooled_size() const { return p_.out_width * p_.outputs; }

  // One row of the convolution, activated and pooled along the row.
  void pool_columns(const T* rows, A* to) {
    multiply_row(rows);
    const auto* conv = conv_row_.get();
    const int64_t outputs = p_.outputs;
    for (int64_t c = 0; c < outputs; c += kLanes<A>) {
      const int64_t count = outputs - c;
      const Vector<A> scale = load<A>(static_cast<const A*>(p_.scale) + c, count),
                      shift = load<A>(static_cast<const A*>(p_.shift) + c, count);
      const auto activation = [&](int64_t x) ALWAYS_INLINE_LAMBDA {
        return activate(rounded<S>(load<A>(conv + x * outputs + c, count)), scale, shift);
      };
      Vector<A> left = broadcast<A>(-1);  // below every activation
      for (int64_t x = 0; x < p_.out_width; x++) {
        Vector<A> maximum = larger(left, activation(2 * x));
        if (2 * x + 1 < p_.conv_width) {
          left = activation(2 * x + 1);
          maximum = larger(left, maximum);
        }
        store(to + x * outputs + c, maximum, count);
      }
    }
  }

  // conv_row_ = the convolution's row that begins to see the image at ``rows``.
  void multiply_row(const T* rows) {
    Product<T, A> product{};
    product.rows = p_.conv_width;
    product.columns = product.b_stride = product.c_stride = p_.outputs;
    product.depth = weight_.depth();
    product.segments = p_.kernel[0];
    product.b = weight_.packed();
    product.b_segment = weight_.depth() * p_.outputs;
    product.c = conv_row_.get();
    if (overlap_) {
      product.a = rows;
      product.a_stride = p_.stride[1] * p_.channels;
      product.a_segment = rows_.stride();
    } else {
      product.a = gather_patches(rows);
      product.a_stride = p_.kernel[0] * weight_.depth();
      product.a_segment = weight_.depth();
    }
    Prefetch nothing;
    multiply(product, nothing);
  }

  // What every pixel sees, zeros behind each row of it.
  const T* gather_patches(const T* rows) {
    if (!patches_) patches_.emplace(p_.conv_width * p_.kernel[0] * weight_.depth());
    T* to = patches_->get();
    for (int64_t x = 0; x < p_.conv_width; x++) {
      for (int64_t y = 0; y < p_.kernel[0]; y++, to += weight_.depth()) {
        const T* from = rows + y * rows_.stride() + x * p_.stride[1] * p_.channels;
        std::fill(std::copy_n(from, weight_.taps(), to), to + weight_.depth(), T(0));
      }
    }
    return patches_->get();
  }

  void write(int64_t image, int64_t y, const A* above, const A* center, const A* below) const {
    S* out = static_cast<S*>(p_.out) + (image * p_.out_height + y) * p_.out_width * p_.out_stride;
    for (int64_t x = 0; x < p_.out_width; x++) {
      for (int64_t c = 0; c < p_.outputs; c += kLanes<A>) {
        const int64_t place = x * p_.outputs + c, count = p_.outputs - c;
        const auto row = [&](const A* rows) { return load<A>(rows + place, count); };
        store(out + x * p_.out_stride + c, larger(larger(row(above), row(center)), row(below)), count);
      }
    }
  }

  const ConvMaxPoolForward& p_;
  const Weight<S, T>& weight_;
  PaddedRows<S, T> rows_;
  Scratch<A> conv_row_, pooled_rows_;
  std::optional<Scratch<T>> patches_;
  bool overlap_ = false;  // whether products read the rows where they lie, for what they read too much is zero times it
};

template <typename S, typename T>
void forward(const ConvMaxPoolForward& p) {
  const Weight<S, T> weight(p);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t most_rows = std::clamp<int64_t>(ceil_div(p.images * p.out_height, 2 * threads), 1, kMostRows);
  const int64_t bands = ceil_div(p.out_height, most_rows);
  parallel_tasks(p.images * bands, [&](TaskRun& run) {
    const Multiplying<T> multiplying;
    Bands<S, T> mine(p, weight, most_rows);
    for (int64_t task; run.next(task);) {
      const int64_t band = task % bands;
      mine.run(task / bands, p.out_height * band / bands, p.out_height * (band + 1) / bands);
    }
  });
}

}  // namespace

void conv_bn_relu_max_pool(const ConvMaxPoolForward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() { forward<S, T>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
