#include "cpu/kernels/bn_relu_conv1x1.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/multiply.h"
#include "cpu/kernels/statistics.h"
#include "cpu/kernels/tasks.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kMicroRows = 6;  // of the micro-kernel: tiles are multiples of it
constexpr int64_t kTileRows = 72;  // at most
constexpr int64_t kDepth = 512;    // channels per product: the activations of a tile stay in the second-level cache

// The rows of a tile when ``rows`` are cut into an even number of tiles, about equal; few tiles are cut exactly.
int64_t rows_of_a_tile(int64_t rows) {
  constexpr int64_t few = 8;
  const int64_t tiles = round_up(ceil_div(std::max<int64_t>(rows, 1), kTileRows), 2);
  const int64_t share = std::max<int64_t>(1, ceil_div(rows, tiles));
  return tiles <= few ? share : round_up(share, kMicroRows);
}

// The elements that pack_weight writes.
int64_t packed_size(int64_t channels, int64_t outputs) { return round_up(channels, 2) * outputs; }

// weight^T [channels, outputs] as the right operand of a product, chunk of channels by chunk.
template <typename T, typename A>
void pack_weight(const A* weight, int64_t channels, int64_t outputs, T* packed) {
  constexpr int64_t block = 32;
  at::parallel_for(0, ceil_div(channels, block), 4, [&](int64_t begin, int64_t end) {
    Scratch<A> transposed(block * outputs);
    for (int64_t index = begin; index < end; index++) {
      const int64_t first = index * block, count = std::min(block, channels - first);
      transpose(weight + first, channels, outputs, count, transposed.get(), outputs);
      pack_gathered(count, outputs, packed + first * outputs,
                    [&](int64_t row) -> const A* { return transposed.get() + row * outputs; });
    }
  });
}

template <typename S, typename T>
void forward(const Conv1x1Forward& p) {
  using A = Accumulate<S>;
  const auto* x = static_cast<const S*>(p.x);
  const auto *scale = static_cast<const A*>(p.scale), *shift = static_cast<const A*>(p.shift);
  auto* out = static_cast<S*>(p.out);
  const int64_t outputs = p.outputs;
  const int64_t tile_rows = rows_of_a_tile(p.rows), tiles = ceil_div(p.rows, tile_rows);
  const Scratch<T> packed_here(p.packed ? 0 : packed_size(p.channels, outputs));
  if (!p.packed) pack_weight(static_cast<const A*>(p.weight), p.channels, outputs, packed_here.get());
  const T* weight = p.packed ? static_cast<const T*>(p.packed) : packed_here.get();
  TileStatistics<A> statistics(p.mean ? tiles : 0, outputs);

  parallel_tasks(tiles, [&](TaskRun& run) {
    const int64_t stride = std::min(round_up(p.channels, 16), kDepth) + 16;
    Scratch<T> activations(tile_rows * stride);
    Scratch<A> products(std::is_same_v<S, A> ? 0 : tile_rows * outputs);
    Prefetch prefetch;
    for (int64_t tile; run.next(tile);) {
      const int64_t row = tile * tile_rows, rows = std::min(tile_rows, p.rows - row);
      S* tile_out = out + row * p.out_stride;
      A* sums = products.get();
      int64_t sums_stride = outputs;
      if constexpr (std::is_same_v<S, A>) {
        sums = tile_out;
        sums_stride = p.out_stride;
      }
      for (int64_t c = 0; c < p.channels; c += kDepth) {
        const int64_t depth = std::min(kDepth, p.channels - c);
        activate_rows(x + row * p.x_stride + c, p.x_stride, scale + c, shift + c, rows, depth, activations.get(),
                      stride, kPairedRows<T> ? round_up(depth, 2) : depth);
        const bool last = c + depth == p.channels;
        const int64_t next_row = last ? row + tile_rows : row, next_channel = last ? 0 : c + depth;
        prefetch.add(x + next_row * p.x_stride + next_channel, p.x_stride, std::min(tile_rows, p.rows - next_row),
                     std::min(kDepth, p.channels - next_channel));
        multiply(rows, outputs, depth, activations.get(), stride, weight + c * outputs, outputs, sums, sums_stride,
                 c > 0, prefetch);
      }
      if constexpr (!std::is_same_v<S, A>) store_rows(sums, outputs, rows, outputs, tile_out, p.out_stride);
      if (p.mean) statistics.take(tile, tile_out, p.out_stride, rows);
    }
    release_gemm<T>();
  });
  if (p.mean) statistics.merge(static_cast<A*>(p.mean), static_cast<A*>(p.variance));
}

// ---- backward

constexpr int64_t kBackwardRows = 120;  // a multiple of the micro-kernel's rows
constexpr int64_t kPanel = 64;          // channels of x that are taken at a time

// How a backward is cut into tasks: groups of rows by spans of channels. By shape alone, so that sums have one order.
struct Tasks {
  int64_t group_rows, groups, tile_rows, span, spans;

  Tasks(int64_t rows, int64_t channels) {
    constexpr int64_t rows_of_a_group = 800, most_groups = 32, wanted = 8;
    const int64_t parts = std::min(most_groups, round_up(ceil_div(rows, rows_of_a_group), 2));
    group_rows = rows < rows_of_a_group ? std::max<int64_t>(rows, 1) : ceil_div(rows, parts);
    groups = ceil_div(rows, group_rows);
    tile_rows = round_up(ceil_div(group_rows, ceil_div(group_rows, kBackwardRows)), kMicroRows);
    spans = groups < wanted / 2 ? wanted / std::max<int64_t>(groups, 1) : 1;
    span = round_up(ceil_div(channels, spans), kPanel);
    spans = ceil_div(channels, span);
  }
};

// The finished gradient of a tile's outputs, row by row and transposed.
template <typename T>
struct FinishedGradient {
  int64_t stride, transposed_stride;
  Scratch<T> rows, transposed;

  explicit FinishedGradient(int64_t outputs)
      : stride(round_up(outputs, 16) + 16),
        transposed_stride(round_up(kBackwardRows, 16) + 16),
        rows(kBackwardRows * stride),
        transposed(outputs * transposed_stride) {}
};

// out_grad + out_offset + (out - out_mean) * out_slope of a tile; rows up to ``padded`` are zeroed.
template <typename S, typename T>
void finish_gradient(const Conv1x1Backward& p, int64_t row, int64_t rows, int64_t padded, FinishedGradient<T>& to) {
  using A = Accumulate<S>;
  const auto* out_grad = static_cast<const S*>(p.out_grad) + row * p.out_grad_stride;
  const auto* out = static_cast<const S*>(p.out) + row * p.out_stride;
  const auto *mean = static_cast<const A*>(p.out_mean), *slope = static_cast<const A*>(p.out_slope),
             *offset = static_cast<const A*>(p.out_offset);
  T* rows_out = to.rows.get();
  for (int64_t c = 0; c < to.stride - 16; c += kLanes<A>) {
    const int64_t count = std::min(kLanes<A>, p.outputs - c);
    if (count <= 0) {
      for (int64_t r = 0; r < padded; r++) store(rows_out + r * to.stride + c, Vector<A>{}, kLanes<A>);
      continue;
    }
    const Vector<A> m = load<A>(mean + c, count), s = load<A>(slope + c, count), o = load<A>(offset + c, count);
    for (int64_t r = 0; r < rows; r++) {
      const Vector<A> gradient = load<A>(out_grad + r * p.out_grad_stride + c, count);
      const Vector<A> value = load<A>(out + r * p.out_stride + c, count);
      store(rows_out + r * to.stride + c, gradient + o + (value - m) * s, kLanes<A>);
    }
    for (int64_t r = rows; r < padded; r++) store(rows_out + r * to.stride + c, Vector<A>{}, kLanes<A>);
  }
  transpose(rows_out, to.stride, padded, p.outputs, to.transposed.get(), to.transposed_stride);
}

// The activations of a panel as the right operand of dweight = out_grad^T @ activations.
template <typename S, typename T, typename A>
void activate_panel(const S* x, int64_t x_stride, const A* scale, const A* shift, int64_t rows, int64_t padded,
                    int64_t columns, T* panel) {
  if constexpr (!kPairedRows<T>) {
    activate_rows(x, x_stride, scale, shift, rows, columns, panel, kPanel, columns);
    for (int64_t r = rows; r < padded; r++) std::fill_n(panel + r * kPanel, columns, T(0));
  } else {
    for (int64_t c = 0; c < columns; c += kLanes<A>) {
      const int64_t count = columns - c;
      const Vector<A> a = load<A>(scale + c, count), b = load<A>(shift + c, count);
      for (int64_t r = 0; r < padded; r += 2) {
        const S* from = x + r * x_stride + c;
        const Vector<A> even = r < rows ? activate(load<A>(from, count), a, b) : Vector<A>{};
        const Vector<A> odd = r + 1 < rows ? activate(load<A>(from + x_stride, count), a, b) : Vector<A>{};
        store_pair(panel + r * kPanel + 2 * c, even, odd);
      }
    }
  }
}

// Masks a panel's gradient, takes its sums and adds scale times it into ``grad`` (unless null).
template <typename S, typename A>
void deposit_panel(const A* gradient, const S* x, int64_t x_stride, const A* mean, const A* scale, const A* shift,
                   int64_t rows, int64_t columns, S* grad, int64_t grad_stride, A* sum_grad, A* sum_grad_x) {
  for (int64_t c = 0; c < columns; c += kLanes<A>) {
    const int64_t count = columns - c;
    const Vector<A> a = load<A>(scale + c, count), b = load<A>(shift + c, count), m = load<A>(mean + c, count);
    Vector<A> sum{}, sum_x{};
    for (int64_t r = 0; r < rows; r++) {
      const Vector<A> value = load<A>(x + r * x_stride + c, count);
      const Vector<A> masked = relu_mask(value * a + b, load<A>(gradient + r * kPanel + c));
      sum += masked;
      sum_x += masked * (value - m);
      if (grad) {
        S* to = grad + r * grad_stride + c;
        store(to, load<A>(static_cast<const S*>(to), count) + masked * a, count);
      }
    }
    store(sum_grad + c, load<A>(static_cast<const A*>(sum_grad + c), count) + sum, count);
    store(sum_grad_x + c, load<A>(static_cast<const A*>(sum_grad_x + c), count) + sum_x, count);
  }
}

// Weight [outputs, channels] in panels of channels, each the right operand [outputs, columns] of a product.
template <typename T, typename A>
void pack_panels(const A* weight, int64_t channels, int64_t outputs, T* packed) {
  at::parallel_for(0, ceil_div(channels, kPanel), 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      const int64_t c = panel * kPanel, columns = std::min(kPanel, channels - c);
      pack_gathered(outputs, columns, packed + c * round_up(outputs, 2),
                    [&](int64_t row) -> const A* { return weight + row * channels + c; });
    }
  });
}

// What the tasks leave: per group of rows the weight's gradient in panels [outputs, kPanel], and the sums.
template <typename A>
struct Partials {
  int64_t channels, outputs;  // channels rounded up to whole panels
  Scratch<A> grad_weight, sums;

  Partials(int64_t groups, int64_t channels_, int64_t outputs_, bool with_weight)
      : channels(round_up(channels_, kPanel)),
        outputs(outputs_),
        grad_weight(with_weight ? groups * channels * outputs : 0),
        sums(groups * 2 * channels) {}

  A* weight_panel(int64_t group, int64_t channel) const {
    return grad_weight.get() + group * channels * outputs + channel * outputs;
  }
  A* sum_grad(int64_t group) const { return sums.get() + group * 2 * channels; }
  A* sum_grad_x(int64_t group) const { return sum_grad(group) + channels; }
};

template <typename S, typename T>
class Backward {
  using A = Accumulate<S>;

 public:
  explicit Backward(const Conv1x1Backward& arguments)
      : p_(arguments),
        tasks_(p_.rows, p_.channels),
        weight_(p_.sum_grad ? round_up(p_.channels, kPanel) * round_up(p_.outputs, 2) : 0),
        partials_(tasks_.groups, p_.channels, p_.outputs, p_.grad_weight != nullptr) {}

  void run() {
    if (p_.sum_grad) pack_panels(static_cast<const A*>(p_.weight), p_.channels, p_.outputs, weight_.get());
    parallel_tasks(tasks_.groups * tasks_.spans, [&](TaskRun& run) {
      FinishedGradient<T> finished(p_.outputs);
      Scratch<T> panel(kBackwardRows * kPanel);
      Scratch<A> gradient(kBackwardRows * kPanel);
      Prefetch prefetch;
      for (int64_t task; run.next(task);) {
        run_task(task / tasks_.spans, task % tasks_.spans, finished, panel.get(), gradient.get(), prefetch);
      }
      release_gemm<T>();
    });
    reduce();
  }

 private:
  void run_task(int64_t group, int64_t span, FinishedGradient<T>& finished, T* panel, A* gradient, Prefetch& prefetch) {
    const int64_t first_row = group * tasks_.group_rows, last_row = std::min(p_.rows, first_row + tasks_.group_rows);
    const int64_t first = span * tasks_.span, last = std::min(p_.channels, first + tasks_.span);
    std::fill(partials_.sum_grad(group) + first, partials_.sum_grad(group) + last, A(0));
    std::fill(partials_.sum_grad_x(group) + first, partials_.sum_grad_x(group) + last, A(0));
    for (int64_t row = first_row; row < last_row; row += tasks_.tile_rows) {
      const int64_t rows = std::min(tasks_.tile_rows, last_row - row);
      const int64_t padded = kPairedRows<T> ? round_up(rows, 2) : rows;
      finish_gradient<S>(p_, row, rows, padded, finished);
      for (int64_t c = first; c < last; c += kPanel) {
        const int64_t columns = std::min(kPanel, last - c);
        ask_ahead(row, rows, last_row, c, columns, first, last, prefetch);
        if (p_.grad_weight)
          weight_gradient(group, row, rows, padded, c, columns, row > first_row, finished, panel, prefetch);
        if (p_.sum_grad) input_gradient(group, row, rows, c, columns, finished, gradient, prefetch);
      }
    }
  }

  // Asks for what comes after the products of this panel: its part of ``grad``, the next panel of x, and at the first
  // panel of a tile what finishes the gradient of the next tile.
  void ask_ahead(int64_t row, int64_t rows, int64_t last_row, int64_t c, int64_t columns, int64_t first, int64_t last,
                 Prefetch& prefetch) {
    const auto* x = static_cast<const S*>(p_.x);
    const int64_t next_row = row + rows, next_rows = std::min(tasks_.tile_rows, last_row - next_row);
    const auto* grad = static_cast<const S*>(p_.grad);
    prefetch.add(grad ? grad + row * p_.grad_stride + c : nullptr, p_.grad_stride, rows, columns);
    if (c + columns < last) {
      const int64_t next = c + columns;
      prefetch.add(x + row * p_.x_stride + next, p_.x_stride, rows, std::min(kPanel, last - next));
    } else {
      prefetch.add(x + next_row * p_.x_stride + first, p_.x_stride, next_rows, std::min(kPanel, last - first));
    }
    if (c == first) {
      const auto *out_grad = static_cast<const S*>(p_.out_grad), *out = static_cast<const S*>(p_.out);
      prefetch.add(out_grad + next_row * p_.out_grad_stride, p_.out_grad_stride, next_rows, p_.outputs);
      prefetch.add(out + next_row * p_.out_stride, p_.out_stride, next_rows, p_.outputs);
    }
  }

  void weight_gradient(int64_t group, int64_t row, int64_t rows, int64_t padded, int64_t c, int64_t columns,
                       bool accumulate, const FinishedGradient<T>& finished, T* panel, Prefetch& prefetch) {
    const auto* x = static_cast<const S*>(p_.x) + row * p_.x_stride + c;
    const auto *scale = static_cast<const A*>(p_.scale) + c, *shift = static_cast<const A*>(p_.shift) + c;
    activate_panel(x, p_.x_stride, scale, shift, rows, padded, columns, panel);
    multiply(p_.outputs, columns, padded, static_cast<const T*>(finished.transposed.get()), finished.transposed_stride,
             static_cast<const T*>(panel), kPanel, partials_.weight_panel(group, c), kPanel, accumulate, prefetch);
  }

  void input_gradient(int64_t group, int64_t row, int64_t rows, int64_t c, int64_t columns,
                      const FinishedGradient<T>& finished, A* gradient, Prefetch& prefetch) {
    multiply(rows, columns, p_.outputs, static_cast<const T*>(finished.rows.get()), finished.stride,
             static_cast<const T*>(weight_.get() + c * round_up(p_.outputs, 2)), columns, gradient, kPanel, false,
             prefetch);
    S* grad = p_.grad ? static_cast<S*>(p_.grad) + row * p_.grad_stride + c : nullptr;
    deposit_panel(gradient, static_cast<const S*>(p_.x) + row * p_.x_stride + c, p_.x_stride,
                  static_cast<const A*>(p_.mean) + c, static_cast<const A*>(p_.scale) + c,
                  static_cast<const A*>(p_.shift) + c, rows, columns, grad, p_.grad_stride,
                  partials_.sum_grad(group) + c, partials_.sum_grad_x(group) + c);
  }

  // Adds the groups' partial results in their order.
  void reduce() {
    at::parallel_for(0, ceil_div(p_.channels, kPanel), 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; index++) {
        const int64_t c = index * kPanel, columns = std::min(kPanel, p_.channels - c);
        if (p_.grad_weight) reduce_weight_panel(c, columns);
        if (p_.sum_grad) {
          reduce_sums(&Partials<A>::sum_grad, c, columns, static_cast<A*>(p_.sum_grad));
          reduce_sums(&Partials<A>::sum_grad_x, c, columns, static_cast<A*>(p_.sum_grad_x));
        }
      }
    });
  }

  void reduce_weight_panel(int64_t c, int64_t columns) {
    for (int64_t output = 0; output < p_.outputs; output++) {
      A* to = static_cast<A*>(p_.grad_weight) + output * p_.channels + c;
      for (int64_t n = 0; n < columns; n += kLanes<A>) {
        Vector<A> total{};
        for (int64_t group = 0; group < tasks_.groups; group++) {
          total += load<A>(static_cast<const A*>(partials_.weight_panel(group, c) + output * kPanel + n), columns - n);
        }
        store(to + n, total, columns - n);
      }
    }
  }

  void reduce_sums(A* (Partials<A>::*of_group)(int64_t) const, int64_t c, int64_t columns, A* to) {
    for (int64_t n = c; n < c + columns; n++) {
      double total = 0;
      for (int64_t group = 0; group < tasks_.groups; group++) total += (partials_.*of_group)(group)[n];
      to[n] = static_cast<A>(total);
    }
  }

  const Conv1x1Backward& p_;
  Tasks tasks_;
  Scratch<T> weight_;
  Partials<A> partials_;
};

}  // namespace

void bn_relu_conv1x1_backward(const Conv1x1Backward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() { Backward<S, T>(arguments).run(); });
}

int64_t conv1x1_packed_bytes(c10::ScalarType dtype, int64_t channels, int64_t outputs) {
  int64_t bytes = 0;
  dispatch_product(dtype, [&]<typename S, typename T>() {
    bytes = packed_size(channels, outputs) * sizeof(T) + Scratch<T>::kSlack;
  });
  return bytes;
}

void pack_conv1x1(c10::ScalarType dtype, const void* weight, int64_t channels, int64_t outputs, void* packed) {
  dispatch_product(dtype, [&]<typename S, typename T>() {
    pack_weight(static_cast<const Accumulate<S>*>(weight), channels, outputs, static_cast<T*>(packed));
  });
}

void bn_relu_conv1x1(const Conv1x1Forward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() { forward<S, T>(arguments); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
