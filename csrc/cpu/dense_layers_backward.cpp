// The backward of the layers of a dense block, as densenet_efficient/dense_layers.py has it.
#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/dense_layers.h"
#include "cpu/memory.h"
#include "cpu/views.h"
#include "operators.h"

namespace densenet_efficient {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Gradients = std::vector<OptionalTensor>;

// The sums that a norm's gradients are made of, [C] each; none where they are not needed.
struct Sums {
  OptionalTensor grad, grad_x;
};

// What a convolution's backward leaves beside the gradient of its input.
struct Outputs {
  OptionalTensor conv_grad;
  Sums sums;

  // Of another part of the images.
  Outputs empty_like() const {
    const auto like = [](const OptionalTensor& tensor) {
      return tensor ? OptionalTensor(tensor->new_empty_strided(tensor->sizes(), tensor->strides())) : std::nullopt;
    };
    return {like(conv_grad), {like(sums.grad), like(sums.grad_x)}};
  }

  void add(const Outputs& other) {
    const auto add = [](OptionalTensor& to, const OptionalTensor& tensor) {
      if (to) to->add_(*tensor);
    };
    add(conv_grad, other.conv_grad);
    add(sums.grad, other.sums.grad);
    add(sums.grad_x, other.sums.grad_x);
  }
};

// Of the images, where bottlenecks that make a step's peak are recomputed: recomputed_parts in dense_layers.py.
constexpr int64_t kMostParts = 4;

// Rows of whole images.
struct Part {
  int64_t start, rows;

  Tensor of(const Tensor& tensor) const { return rows == tensor.size(0) ? tensor : narrow(tensor, 0, start, rows); }
  OptionalTensor of(const OptionalTensor& tensor) const { return tensor ? OptionalTensor(of(*tensor)) : std::nullopt; }
};

// The deferred part of the backward of the batch norms of the same channels: batch_norm.Projection in Python.
struct Projection {
  Tensor slope, offset;  // [C]
  bool is_empty;

  // Adds one consumer of the first channels, and returns the gradients of its weight and bias.
  std::pair<OptionalTensor, OptionalTensor> add(const Norm& norm, const Affine& affine, const Sums& sums,
                                                int64_t count) {
    if (!sums.grad) return {};
    OptionalTensor its_slope, its_offset;
    if (norm.uses_batch()) {
      is_empty = false;
      its_slope = narrow(slope, 0, 0, sums.grad->size(0));
      its_offset = narrow(offset, 0, 0, sums.grad->size(0));
    }
    Tensor grad_weight = sums.grad->new_empty(sums.grad->sizes());
    batch_norm_gradients(*sums.grad, *sums.grad_x, affine.rstd, affine.scale, std::max<int64_t>(count, 1), grad_weight,
                         its_slope, its_offset);
    return {grad_weight, sums.grad};
  }

  // Corrects the gradient of ``count`` channels from ``start`` on, in place.
  void apply(const Tensor& grad, const Tensor& storage, const Tensor& mean, int64_t start, int64_t count) const {
    if (is_empty) return;
    project_gradient(narrow(grad, 1, start, count), narrow(storage, 1, start, count), narrow(mean, 0, start, count),
                     narrow(slope, 0, start, count), narrow(offset, 0, start, count));
  }
};

// Which gradients of a layer's parameters are needed.
struct Needed {
  bool norm1, conv1, norm2, conv2;

  bool any() const { return norm1 || conv1 || norm2 || conv2; }
};

struct Backward {
  const Tensor &grad, &storage;  // [M, C]
  int64_t height, width;
  const Tensor &statistics, &bottleneck_statistics;
  at::TensorList bottlenecks;  // of the last layers
  Projection projection;
  Tensor bottleneck_scratch, bottleneck_grad_scratch;  // serve every layer

  int64_t rows() const { return storage.size(0); }

  // The layers, the first ones, whose bottlenecks are recomputed.
  size_t recomputed() const { return bottleneck_statistics.size(0) - bottlenecks.size(); }

  // From the finished gradient of a layer's slot, behind ``channels`` others, to the gradient of its inputs; returns
  // that of its parameters.
  Gradients run(const DenseLayer& layer, size_t index, int64_t channels, const Needed& needed, bool below_needed) {
    const Tensor inputs = narrow(storage, 1, 0, channels), slot_grad = narrow(grad, 1, channels, layer.growth_rate());
    const OptionalTensor inputs_grad = below_needed ? OptionalTensor(narrow(grad, 1, 0, channels)) : std::nullopt;
    const Affine affine = layer.norm1.affine(narrow(select(statistics, 0), 0, 0, channels),
                                             narrow(select(statistics, 1), 0, 0, channels));
    const bool norm1_needed = needed.norm1 || below_needed;
    const OptionalTensor conv1_grad = like(layer.conv1, needed.conv1);
    if (!layer.norm2) {
      const Sums sums = sums_of(channels, norm1_needed);
      bn_relu_conv3x3_backward(slot_grad, inputs, affine.mean, affine.scale, affine.shift, layer.conv1, height, width,
                               inputs_grad, true, conv1_grad, sums.grad, sums.grad_x);
      const auto [weight_grad, bias_grad] = projection.add(layer.norm1, affine, sums, rows());
      return {weight_grad, bias_grad, conv1_grad};
    }
    const bool bottleneck_needed = norm1_needed || needed.conv1;
    const int64_t width2 = layer.conv1.size(0);
    const Tensor own_statistics = select(bottleneck_statistics, index);
    const Affine affine2 = layer.norm2->affine(select(own_statistics, 0), select(own_statistics, 1));
    const OptionalTensor bottleneck_grad =
        bottleneck_needed ? OptionalTensor(scratch(bottleneck_grad_scratch, rows(), width2)) : std::nullopt;
    Outputs outputs2{like(*layer.conv2, needed.conv2), sums_of(width2, bottleneck_needed || needed.norm2)};
    const bool is_saved = index >= recomputed();
    const OptionalTensor room = is_saved ? std::nullopt : room_behind(channels + layer.growth_rate(), width2);
    const std::vector<Part> parts = parts_of(width2, is_saved || room);
    const Tensor place = is_saved ? bottlenecks[index - recomputed()] : place_of(parts, width2, room);
    Tensor bottleneck;
    for (size_t part = 0; part < parts.size(); part++) {
      const Part& images = parts[part];
      bottleneck = is_saved ? place : recompute_bottleneck(layer, images, inputs, affine, place);
      Outputs own = part == 0 ? outputs2 : outputs2.empty_like();
      bn_relu_conv3x3_backward(images.of(slot_grad), bottleneck, affine2.mean, affine2.scale, affine2.shift,
                               *layer.conv2, height, width, images.of(bottleneck_grad), false, own.conv_grad,
                               own.sums.grad, own.sums.grad_x);
      if (part > 0) outputs2.add(own);
    }
    const Tensor coefficients = statistics.new_zeros({2, width2});
    Projection finish{select(coefficients, 0), select(coefficients, 1), true};
    const auto [weight2_grad, bias2_grad] = finish.add(*layer.norm2, affine2, outputs2.sums, rows());
    const OptionalTensor& conv2_grad = outputs2.conv_grad;
    if (!bottleneck_needed) return {std::nullopt, std::nullopt, std::nullopt, weight2_grad, bias2_grad, conv2_grad};
    Outputs outputs{conv1_grad, sums_of(channels, norm1_needed)};
    for (size_t part = parts.size(); part-- > 0;) {  // from the last, whose bottleneck is at hand
      const Part& images = parts[part];
      const bool is_last = part + 1 == parts.size();
      if (!is_last) bottleneck = recompute_bottleneck(layer, images, inputs, affine, place);
      Outputs own = is_last ? outputs : outputs.empty_like();
      bn_relu_conv1x1_backward(images.of(*bottleneck_grad), bottleneck, affine2.mean, finish.slope, finish.offset,
                               images.of(inputs), affine.mean, affine.scale, affine.shift, layer.conv1,
                               images.of(inputs_grad), own.conv_grad, own.sums.grad, own.sums.grad_x);
      if (!is_last) outputs.add(own);
    }
    const auto [weight_grad, bias_grad] = projection.add(layer.norm1, affine, outputs.sums, rows());
    return {weight_grad, bias_grad, conv1_grad, weight2_grad, bias2_grad, conv2_grad};
  }

  // Whether recomputed bottlenecks of so many channels make the peak of a step: recomputed_parts in Python.
  bool make_peak(int64_t channels) const { return 2 * channels >= storage.size(1); }

  // For such bottlenecks the gradients of the channels from ``stop`` on, which are done with, where they are enough.
  OptionalTensor room_behind(int64_t stop, int64_t channels) const {
    const int64_t start = grad.size(1) - channels;
    return make_peak(channels) && start >= stop ? OptionalTensor(narrow(grad, 1, start, channels)) : std::nullopt;
  }

  // The images whose bottlenecks are at hand together; those of the last part are the most.
  std::vector<Part> parts_of(int64_t channels, bool has_all) const {
    const int64_t pixels = height * width, images = rows() / pixels;
    const int64_t count = make_peak(channels) && !has_all ? std::clamp<int64_t>(images, 1, kMostParts) : 1;
    std::vector<Part> parts;
    for (int64_t part = 0; part < count; part++) {
      const int64_t first = images * part / count, end = images * (part + 1) / count;
      parts.push_back({first * pixels, (end - first) * pixels});
    }
    return parts;
  }

  // [rows, K], where bottlenecks are recomputed together.
  Tensor place_of(const std::vector<Part>& parts, int64_t channels, const OptionalTensor& room) {
    return room ? *room : scratch(bottleneck_scratch, parts.back().rows, channels);
  }

  // Of these images, in ``place``; takes no statistics.
  Tensor recompute_bottleneck(const DenseLayer& layer, const Part& images, const Tensor& inputs, const Affine& affine,
                              const Tensor& place) const {
    const Tensor bottleneck = narrow(place, 0, 0, images.rows);
    bn_relu_conv1x1(images.of(inputs), affine.scale, affine.shift, layer.conv1, bottleneck, std::nullopt, std::nullopt);
    return bottleneck;
  }

  Tensor scratch(Tensor& buffer, int64_t rows, int64_t channels) const {
    if (!buffer.defined()) buffer = empty_kept({rows, channels}, storage.options());
    return buffer;
  }

  Sums sums_of(int64_t channels, bool needed) const {
    if (!needed) return {};
    const Tensor both = statistics.new_empty({2, channels});
    return {select(both, 0), select(both, 1)};
  }

  OptionalTensor like(const Tensor& weight, bool needed) const {
    if (!needed) return std::nullopt;
    const auto options = weight.options().dtype(statistics.scalar_type());
    if (!is_contiguous_or_channels_last(weight)) return empty_kept(weight.sizes(), options);  // as the kernels want it
    return empty_kept_strided(weight.sizes(), weight.strides(), options);
  }
};

Needed needed_of(const c10::List<bool>& flags, size_t first, bool has_bottleneck) {
  const auto norm = [&](size_t index) { return flags.get(index) || flags.get(index + 1); };
  return {norm(first), flags.get(first + 2), has_bottleneck && norm(first + 3), has_bottleneck && flags.get(first + 5)};
}

}  // namespace

Gradients dense_layers_backward(const Tensor& grad, const Tensor& storage, int64_t height, int64_t width,
                                const Tensor& statistics, const Tensor& bottleneck_statistics,
                                at::TensorList bottlenecks, at::TensorList weights, at::TensorList biases,
                                at::ArrayRef<double> epsilons, const c10::List<OptionalTensor>& running,
                                at::TensorList convolutions, const Tensor& slope, const Tensor& offset,
                                bool nothing_to_project, const c10::List<bool>& needed, bool input_needed) {
  check_images(storage, "storage", height, width);
  const auto layers = read_layers({weights, biases, epsilons, running, convolutions}, bottleneck_statistics.size(0));
  const size_t parameters = 3 * weights.size() / layers.size();
  TORCH_CHECK(needed.size() == parameters * layers.size(), "needed must have ", parameters, " entries per layer, got ",
              needed.size(), " for ", layers.size(), " layers");
  TORCH_CHECK(bottlenecks.size() <= layers.size(), "bottlenecks must be at most one per layer, got ",
              bottlenecks.size(), " for ", layers.size());
  const auto needed_in = [&](size_t index) {
    return needed_of(needed, index * parameters, layers[index].norm2.has_value());
  };
  size_t lowest = 0;
  while (!input_needed && lowest < layers.size() && !needed_in(lowest).any()) lowest++;

  Backward pass{
      grad, storage, height, width, statistics, bottleneck_statistics, bottlenecks, {slope, offset, nothing_to_project},
      {},   {}};
  const Tensor mean = select(statistics, 0);
  Gradients gradients(needed.size());
  int64_t channels = storage.size(1);
  for (size_t index = layers.size(); index-- > lowest;) {
    const DenseLayer& layer = layers[index];
    channels -= layer.growth_rate();
    pass.projection.apply(grad, storage, mean, channels, layer.growth_rate());
    Gradients own = pass.run(layer, index, channels, needed_in(index), input_needed || index > lowest);
    std::move(own.begin(), own.end(), gradients.begin() + static_cast<int64_t>(index * parameters));
  }
  if (input_needed) pass.projection.apply(grad, storage, mean, 0, channels);
  return gradients;
}

}  // namespace densenet_efficient
