#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/bn_relu_conv1x1.h"
#include "cpu/kernels/deposit.h"
#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/multiply_masked.h"
#include "cpu/kernels/tasks.h"
#include "cpu/kernels/tile.h"

namespace densenet_efficient::CPU_CAPABILITY {
namespace {

constexpr int64_t kPanel = 64;  // channels of x that are taken at a time
template <typename T>
constexpr int64_t kStrip = std::min(kPanel, kStripColumns<T>);  // of them, of the weight

// The rows of a tile, at most, and those whose gradient is deposited while it lies in the first cache: multiples of the
// micro-kernel's rows.
template <typename T>
constexpr bool kTiled = (kProductRows<T> > 1);
template <typename T>
constexpr int64_t kTileRows = kTiled<T> ? 256 : 112;
template <typename T>
constexpr int64_t kStepRows = kTiled<T> ? 32 : 28;

// How a backward is cut into tasks: groups of rows by spans of channels. The groups follow from the shape alone, so
// that sums have one order. A span has its own sums, so that fewer groups than threads may have several spans each:
// enough for the threads to take as they become free.
struct Tasks {
  int64_t group_rows, groups, tile_rows, tiles, span, spans;

  Tasks(int64_t rows, int64_t channels, int64_t most_rows, int64_t multiple) {
    constexpr int64_t rows_of_a_group = 800, most_groups = 32, tasks_of_a_thread = 3;
    const int64_t parts = std::min(most_groups, round_up(ceil_div(rows, rows_of_a_group), 2));
    group_rows = rows < rows_of_a_group ? std::max<int64_t>(rows, 1) : ceil_div(rows, parts);
    groups = ceil_div(rows, group_rows);
    tile_rows = round_up(ceil_div(group_rows, ceil_div(group_rows, most_rows)), multiple);
    tiles = ceil_div(group_rows, tile_rows);  // of a group
    const int64_t threads = at::get_num_threads();
    spans = groups < threads ? ceil_div(tasks_of_a_thread * threads, std::max<int64_t>(groups, 1)) : 1;
    span = round_up(ceil_div(channels, spans), kPanel);
    spans = ceil_div(channels, span);
  }
};

// The finished gradient of a tile's outputs, row by row and transposed: out_grad + out_offset + (out - out_mean) *
// out_slope. Rows that round up a product are zero.
template <typename T>
struct FinishedGradient {
  int64_t stride, transposed_stride;
  Scratch<T> rows, transposed;
  bool is_finite = true;

  explicit FinishedGradient(int64_t outputs)
      : stride(row_stride<T>(outputs)),
        transposed_stride(round_up(kTileRows<T>, 32) + 32),
        rows(round_up(kTileRows<T>, 32) * stride),
        transposed(round_up(outputs, 16) * transposed_stride) {}

  template <typename S>
  void finish(const Conv1x1Backward& p, int64_t row, int64_t count, bool with_transposed) {
    const int64_t padded = round_up(count, std::max<int64_t>(kProductDepth<T>, 16));
    is_finite = true;
    int64_t c = 0;
    for (; c + 4 * kLanes<Accumulate<S>> <= p.outputs; c += 4 * kLanes<Accumulate<S>>) {
      finish_channels<4, S>(p, row, count, padded, c);
    }
    for (; c < stride - kLine<T>; c += kLanes<Accumulate<S>>) finish_channels<1, S>(p, row, count, padded, c);
    if (with_transposed) {
      transpose(rows.get(), stride, padded, p.outputs, transposed.get(), transposed_stride);
    }
  }

 private:
  template <int V, typename S>
  void finish_channels(const Conv1x1Backward& p, int64_t row, int64_t count, int64_t padded, int64_t c) {
    using A = Accumulate<S>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t width = std::max<int64_t>(0, p.outputs - c);
    const auto* out_grad = static_cast<const S*>(p.out_grad) + row * p.out_grad_stride + c;
    const auto* out = static_cast<const S*>(p.out) + row * p.out_stride + c;
    Vector<A> mean[V], slope[V], offset[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      mean[v] = load<A>(static_cast<const A*>(p.out_mean) + c + v * lanes, width - v * lanes);
      slope[v] = load<A>(static_cast<const A*>(p.out_slope) + c + v * lanes, width - v * lanes);
      offset[v] = load<A>(static_cast<const A*>(p.out_offset) + c + v * lanes, width - v * lanes);
    }
    T* to = rows.get() + c;
    Vector<A> zeros{};  // or NaN
    for (int64_t r = 0; r < count; r++) {
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) {
        const Vector<A> gradient = load<A>(out_grad + r * p.out_grad_stride + v * lanes, width - v * lanes);
        const Vector<A> value = load<A>(out + r * p.out_stride + v * lanes, width - v * lanes);
        const Vector<A> finished = projected(gradient, value, mean[v], slope[v], offset[v]);
        store(to + r * stride + v * lanes, finished, lanes);
        if constexpr (kSkips<T>) zeros += finished * A(0);  // who skips nothing needs not know
      }
    }
    for (int64_t lane = 0; lane < lanes; lane++) is_finite = is_finite && zeros[lane] == 0;
    for (int64_t r = count; r < padded; r++) std::fill_n(to + r * stride, V * lanes, T(0));
  }
};

// Weight [outputs, channels] in strips of channels, each the right operand [outputs, columns] of a product.
template <typename T, typename A>
void pack_panels(const A* weight, int64_t channels, int64_t outputs, T* packed) {
  at::parallel_for(0, ceil_div(channels, kPanel), 4, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; panel++) {
      const int64_t last = std::min((panel + 1) * kPanel, channels);
      for (int64_t c = panel * kPanel; c < last; c += kStrip<T>) {
        pack_gathered(outputs, std::min(kStrip<T>, last - c), packed + c * round_up(outputs, 2),
                      [&](int64_t row) -> const A* { return weight + row * channels + c; });
      }
    }
  });
}

// What the tasks leave: per group of rows the weight's gradient in panels [outputs, kPanel], or [kPanel, outputs] where
// products skip zeros, and the sums.
template <typename A>
struct Partials {
  int64_t channels, outputs;  // channels rounded up to whole panels
  Scratch<A> grad_weight;
  PartialSums<A> sums;

  Partials(int64_t groups, int64_t channels_, int64_t outputs_, bool with_weight)
      : channels(round_up(channels_, kPanel)),
        outputs(outputs_),
        grad_weight(with_weight ? groups * channels * outputs : 0),
        sums(groups, channels) {}

  A* weight_panel(int64_t group, int64_t channel) const {
    return grad_weight.get() + group * channels * outputs + channel * outputs;
  }
};

// One thread's memory.
template <typename T, typename A>
struct Workspace {
  std::unique_ptr<FinishedGradient<T>> finished;  // where tasks do not share it
  Scratch<T> activations{round_up(kTileRows<T>, 32) * kPanel};
  Scratch<A> gradient{kStepRows<T> * kPanel};
  Prefetch prefetch;
};

template <typename S, typename T>
class Backward {
  using A = Accumulate<S>;

 public:
  explicit Backward(const Conv1x1Backward& arguments)
      : p_(arguments),
        skips_(skips_zeros<T>(static_cast<const S*>(p_.x), p_.x_stride, static_cast<const A*>(p_.scale),
                              static_cast<const A*>(p_.shift), p_.rows, p_.channels, p_.outputs)),
        masks_(skips_ && p_.sum_grad && may_mask(p_.outputs)),
        tasks_(p_.rows, p_.channels, kTileRows<T>, kStepRows<T>),
        weight_(p_.sum_grad ? round_up(p_.channels, kPanel) * round_up(p_.outputs, 2) : 0),
        partials_(tasks_.groups, p_.channels, p_.outputs, p_.grad_weight != nullptr) {}

  void run() {
    if (masks_) {
      transpose_weight();
    } else if (p_.sum_grad) {
      pack_panels(static_cast<const A*>(p_.weight), p_.channels, p_.outputs, weight_.get());
    }
    if (tasks_.spans > 1) finish_shared();
    parallel_tasks(tasks_.groups * tasks_.spans, [&](TaskRun& run) {
      Workspace<T, A> workspace;
      if (shared_.empty()) workspace.finished = std::make_unique<FinishedGradient<T>>(p_.outputs);
      const Multiplying<T> multiplying;
      for (int64_t task; run.next(task);) run_task(task / tasks_.spans, task % tasks_.spans, workspace);
    });
    reduce();
  }

 private:
  struct Rows {
    int64_t group, tile, first, count;
  };

  Rows rows_of(int64_t group, int64_t tile) const {
    const int64_t last = std::min(p_.rows, (group + 1) * tasks_.group_rows);
    const int64_t first = std::min(last, group * tasks_.group_rows + tile * tasks_.tile_rows);
    return {group, tile, first, std::min(tasks_.tile_rows, last - first)};
  }

  // As [channels, outputs].
  void transpose_weight() {
    at::parallel_for(0, ceil_div(p_.channels, kPanel), 4, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * kPanel; c < std::min(end * kPanel, p_.channels); c += kPanel) {
        transpose(static_cast<const A*>(p_.weight) + c, p_.channels, p_.outputs, std::min(kPanel, p_.channels - c),
                  weight_.get() + c * p_.outputs, p_.outputs);
      }
    });
  }

  // Few rows of many channels: several tasks need the same finished gradient, which is small.
  void finish_shared() {
    const int64_t tiles = tasks_.groups * tasks_.tiles;
    for (int64_t tile = 0; tile < tiles; tile++) shared_.emplace_back(p_.outputs);
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; index++) {
        const Rows rows = rows_of(index / tasks_.tiles, index % tasks_.tiles);
        shared_[index].template finish<S>(p_, rows.first, rows.count, !skips_);
      }
    });
  }

  void run_task(int64_t group, int64_t span, Workspace<T, A>& workspace) {
    const int64_t first = span * tasks_.span, last = std::min(p_.channels, first + tasks_.span);
    partials_.sums.clear(group, first, last - first);
    for (int64_t tile = 0; tile < tasks_.tiles; tile++) {
      const Rows rows = rows_of(group, tile), next = rows_of(group, tile + 1);
      if (rows.count == 0) continue;
      if (shared_.empty()) workspace.finished->template finish<S>(p_, rows.first, rows.count, !skips_);
      const auto& finished = shared_.empty() ? *workspace.finished : shared_[group * tasks_.tiles + tile];
      for (int64_t c = first; c < last; c += kPanel) {
        const bool accumulate = tile > 0;
        ask_ahead(rows, next, c, first, last, workspace.prefetch);
        run_panel(group, rows, c, std::min(kPanel, last - c), accumulate, finished, workspace);
      }
    }
  }

  // Asks for what comes after this panel: the next one of x and ``grad``, and at the first panel of a tile what
  // finishes the gradient of the next tile.
  void ask_ahead(const Rows& rows, const Rows& next, int64_t c, int64_t first, int64_t last, Prefetch& prefetch) const {
    const auto *x = static_cast<const S*>(p_.x), *grad = static_cast<const S*>(p_.grad);
    const bool within = c + kPanel < last;
    const Rows& ahead = within ? rows : next;
    const int64_t column = within ? c + kPanel : first, columns = std::min(kPanel, last - column);
    prefetch.add(x + ahead.first * p_.x_stride + column, p_.x_stride, ahead.count, columns);
    prefetch.add(grad ? grad + ahead.first * p_.grad_stride + column : nullptr, p_.grad_stride, ahead.count, columns);
    if (c > first) return;
    if (shared_.empty()) {
      const auto *out_grad = static_cast<const S*>(p_.out_grad), *out = static_cast<const S*>(p_.out);
      prefetch.add(out_grad + next.first * p_.out_grad_stride, p_.out_grad_stride, next.count, p_.outputs);
      prefetch.add(out + next.first * p_.out_stride, p_.out_stride, next.count, p_.outputs);
    } else if (next.count > 0) {
      const auto& finished = shared_[next.group * tasks_.tiles + next.tile];
      prefetch.add(finished.rows.get(), finished.stride, next.count, p_.outputs);
      if (!skips_) {
        prefetch.add(finished.transposed.get(), finished.transposed_stride, p_.outputs, next.count);
      }
    }
  }

  // A tile's rows of one panel: a few at a time the gradient of its activations, deposited at once beside the
  // activations themselves; then the weight's gradient.
  void run_panel(int64_t group, const Rows& rows, int64_t c, int64_t columns, bool accumulate,
                 const FinishedGradient<T>& finished, Workspace<T, A>& workspace) {
    for (int64_t row = 0; row < rows.count; row += kStepRows<T>) {
      const int64_t count = std::min(kStepRows<T>, rows.count - row);
      if (masks_) {
        multiply_masked_gradient(rows, row, count, c, columns, finished, workspace);
      } else if (p_.sum_grad) {
        multiply_gradient(row, count, c, columns, finished, workspace);
      }
      T* activations = p_.grad_weight && !masks_ ? workspace.activations.get() + row * kPanel : nullptr;
      deposit(group, rows.first + row, count, c, columns, activations, workspace.gradient.get());
    }
    if (p_.grad_weight) multiply_weight_gradient(group, rows.count, c, columns, accumulate, finished, workspace);
  }

  void multiply_gradient(int64_t row, int64_t rows, int64_t c, int64_t columns, const FinishedGradient<T>& finished,
                         Workspace<T, A>& workspace) const {
    for (int64_t n = 0; n < columns; n += kStrip<T>) {
      const int64_t width = std::min(kStrip<T>, columns - n);
      multiply(Product<T, A>{.rows = round_up(rows, kProductRows<T>),
                             .columns = width,
                             .depth = p_.outputs,
                             .a = finished.rows.get() + row * finished.stride,
                             .a_stride = finished.stride,
                             .b = weight_.get() + (c + n) * round_up(p_.outputs, 2),
                             .b_stride = width,
                             .c = workspace.gradient.get() + n,
                             .c_stride = kPanel},
               workspace.prefetch);
    }
  }

  // The gradient of those activations alone that are not zero, beside the activations themselves.
  void multiply_masked_gradient(const Rows& rows, int64_t row, int64_t count, int64_t c, int64_t columns,
                                const FinishedGradient<T>& finished, Workspace<T, A>& workspace) const {
    if constexpr (kSkips<T>) {
      T* activations = workspace.activations.get() + row * kPanel;
      activate_rows(static_cast<const S*>(p_.x) + (rows.first + row) * p_.x_stride + c, p_.x_stride,
                    static_cast<const A*>(p_.scale) + c, static_cast<const A*>(p_.shift) + c, count, columns,
                    activations, kPanel, columns);
      multiply_masked(MaskedProduct{.rows = count,
                                    .columns = columns,
                                    .depth = p_.outputs,
                                    .activations = activations,
                                    .activations_stride = kPanel,
                                    .a = finished.rows.get() + row * finished.stride,
                                    .a_stride = finished.stride,
                                    .b = weight_.get() + c * p_.outputs,
                                    .c = workspace.gradient.get(),
                                    .c_stride = kPanel},
                      workspace.prefetch);
    }
  }

  void deposit(int64_t group, int64_t row, int64_t count, int64_t c, int64_t columns, T* activations,
               const A* gradient) const {
    S* grad = p_.grad ? static_cast<S*>(p_.grad) + row * p_.grad_stride + c : nullptr;
    Deposit<S, T>{.rows = count,
                  .columns = columns,
                  .x = static_cast<const S*>(p_.x) + row * p_.x_stride + c,
                  .x_stride = p_.x_stride,
                  .mean = static_cast<const A*>(p_.mean) + c,
                  .scale = static_cast<const A*>(p_.scale) + c,
                  .shift = static_cast<const A*>(p_.shift) + c,
                  .gradient = p_.sum_grad ? gradient : nullptr,
                  .gradient_stride = kPanel,
                  .grad = grad,
                  .grad_stride = p_.grad_stride,
                  .accumulate = true,
                  .activations = activations,
                  .activations_stride = kPanel,
                  .sum_grad = partials_.sums.sum_grad(group) + c,
                  .sum_grad_x = partials_.sums.sum_grad_x(group) + c}
        .run();
  }

  void multiply_weight_gradient(int64_t group, int64_t rows, int64_t c, int64_t columns, bool accumulate,
                                const FinishedGradient<T>& finished, Workspace<T, A>& workspace) {
    if constexpr (kSkips<T>) {
      if (skips_) {
        multiply_skipping(ActivationProduct{.rows = columns,
                                            .columns = p_.outputs,
                                            .depth = rows,
                                            .a = workspace.activations.get(),
                                            .a_row = 1,
                                            .a_step = kPanel,
                                            .b = finished.rows.get(),
                                            .b_stride = finished.stride,
                                            .b_strip = kStripColumns<T>,
                                            .c = partials_.weight_panel(group, c),
                                            .c_stride = p_.outputs,
                                            .accumulate = accumulate,
                                            .is_finite = finished.is_finite},
                          workspace.prefetch);
        return;
      }
    }
    const int64_t deposited = kPairedRows<T> ? round_up(rows, 2) : rows, depth = round_up(rows, kProductDepth<T>);
    std::fill_n(workspace.activations.get() + deposited * kPanel, (depth - deposited) * kPanel, T(0));
    multiply(Product<T, A>{.rows = p_.outputs,
                           .columns = columns,
                           .depth = depth,
                           .a = finished.transposed.get(),
                           .a_stride = finished.transposed_stride,
                           .b = workspace.activations.get(),
                           .b_stride = kPanel,
                           .c = partials_.weight_panel(group, c),
                           .c_stride = kPanel,
                           .accumulate = accumulate},
             workspace.prefetch);
  }

  // Adds the groups' partial results in their order.
  void reduce() {
    at::parallel_for(0, ceil_div(p_.channels, kPanel), 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; index++) {
        const int64_t c = index * kPanel, columns = std::min(kPanel, p_.channels - c);
        if (p_.grad_weight) reduce_weight_panel(c, columns);
        if (p_.sum_grad) partials_.sums.merge(c, columns, p_.sum_grad, p_.sum_grad_x);
      }
    });
  }

  void reduce_weight_panel(int64_t c, int64_t columns) {
    if (skips_) return reduce_transposed(c, columns);
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

  // Of a panel [channels, outputs].
  void reduce_transposed(int64_t c, int64_t columns) {
    A* total = partials_.weight_panel(0, c);
    for (int64_t group = 1; group < tasks_.groups; group++) {
      const A* panel = partials_.weight_panel(group, c);
      for (int64_t i = 0; i < columns * p_.outputs; i += kLanes<A>) {
        store(total + i, load<A>(static_cast<const A*>(total + i)) + load<A>(panel + i));
      }
    }
    transpose(total, p_.outputs, columns, p_.outputs, static_cast<A*>(p_.grad_weight) + c, p_.channels);
  }

  const Conv1x1Backward& p_;
  bool skips_;  // what is multiplied by an activation that is zero
  bool masks_;  // the gradient of such an activation
  Tasks tasks_;
  Scratch<T> weight_;
  Partials<A> partials_;
  std::vector<FinishedGradient<T>> shared_;
};

}  // namespace

void bn_relu_conv1x1_backward(const Conv1x1Backward& arguments) {
  dispatch_product(arguments.dtype, [&]<typename S, typename T>() { Backward<S, T>(arguments).run(); });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
