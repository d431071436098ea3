// The forward of the layers of a dense block, as densenet_efficient/dense_layers.py has it.
#include "cpu/dense_layers.h"

#include "checks.h"
#include "cpu/memory.h"
#include "cpu/views.h"
#include "operators.h"

namespace densenet_efficient {

using at::Tensor;

Affine Norm::affine(const Tensor& mean, const Tensor& variance) const {
  const Tensor map = mean.new_empty({4, mean.size(0)});
  batch_norm_affine(running_mean.value_or(mean), running_variance.value_or(variance), weight, bias, eps, map);
  return {select(map, 0), select(map, 1), select(map, 2), select(map, 3)};
}

std::vector<DenseLayer> read_layers(const LayerArguments& arguments, size_t count) {
  const size_t norms = arguments.weights.size(), per_layer = count > 0 ? norms / count : 0;
  TORCH_CHECK(
      (per_layer == 1 || per_layer == 2) && norms == per_layer * count && arguments.biases.size() == norms &&
          arguments.epsilons.size() == norms && arguments.running.size() == 2 * norms &&
          arguments.convolutions.size() == norms,
      "weights, biases, epsilons and convolutions must have one or two entries per layer, running twice as many,"
      " got ",
      norms, ", ", arguments.biases.size(), ", ", arguments.epsilons.size(), ", ", arguments.convolutions.size(),
      " and ", arguments.running.size(), " for ", count, " layers");
  const auto norm = [&](size_t index) {
    return Norm{arguments.weights[index], arguments.biases[index], arguments.epsilons[index],
                arguments.running.get(2 * index), arguments.running.get(2 * index + 1)};
  };
  std::vector<DenseLayer> layers;
  layers.reserve(count);
  for (size_t first = 0; first < norms; first += per_layer) {
    layers.push_back({norm(first), arguments.convolutions[first], std::nullopt, std::nullopt});
    if (per_layer == 1) continue;
    layers.back().norm2 = norm(first + 1);
    layers.back().conv2 = arguments.convolutions[first + 1];
  }
  return layers;
}

int64_t input_channels(const std::vector<DenseLayer>& layers, int64_t total) {
  int64_t added = 0;
  for (const DenseLayer& layer : layers) added += layer.growth_rate();
  TORCH_CHECK(added < total, "storage must have more channels than the ", added, " that its layers add, got ", total);
  return total - added;
}

std::vector<Tensor> dense_layers(const Tensor& storage, int64_t height, int64_t width, const Tensor& statistics,
                                 bool with_statistics, const Tensor& bottleneck_statistics, at::TensorList weights,
                                 at::TensorList biases, at::ArrayRef<double> epsilons,
                                 const c10::List<std::optional<Tensor>>& running, at::TensorList convolutions,
                                 int64_t saved_bottlenecks) {
  check_images(storage, "storage", height, width);
  const auto layers = read_layers({weights, biases, epsilons, running, convolutions}, bottleneck_statistics.size(0));
  const int64_t rows = storage.size(0), bottleneck_channels = bottleneck_statistics.size(2);
  const Tensor mean = select(statistics, 0), variance = select(statistics, 1);
  TORCH_CHECK(saved_bottlenecks >= 0 && saved_bottlenecks <= static_cast<int64_t>(layers.size()),
              "saved_bottlenecks must be between 0 and the ", layers.size(), " layers, got ", saved_bottlenecks);
  std::vector<Tensor> bottlenecks;  // the first serves all layers up to the first whose output is saved
  const size_t first_saved = layers.size() - saved_bottlenecks;
  int64_t channels = input_channels(layers, storage.size(1));
  for (size_t index = 0; index < layers.size(); index++) {
    const DenseLayer& layer = layers[index];
    const int64_t growth_rate = layer.growth_rate();
    Tensor inputs = narrow(storage, 1, 0, channels), convolution = layer.conv1;
    Affine affine = layer.norm1.affine(narrow(mean, 0, 0, channels), narrow(variance, 0, 0, channels));
    if (layer.norm2) {
      if (index > first_saved || bottlenecks.empty()) {
        bottlenecks.push_back(empty_kept({rows, bottleneck_channels}, storage.options()));
      }
      const Tensor bottleneck = bottlenecks.back(), own = select(bottleneck_statistics, index);
      const Tensor own_mean = select(own, 0), own_variance = select(own, 1);
      const bool wanted = layer.norm2->uses_batch();
      bn_relu_conv1x1(inputs, affine.scale, affine.shift, layer.conv1, bottleneck,
                      wanted ? std::optional(own_mean) : std::nullopt,
                      wanted ? std::optional(own_variance) : std::nullopt);
      inputs = bottleneck;
      affine = layer.norm2->affine(own_mean, own_variance);
      convolution = *layer.conv2;
    }
    const auto of_slot = [&](const Tensor& statistic) {
      return with_statistics ? std::optional(narrow(statistic, 0, channels, growth_rate)) : std::nullopt;
    };
    bn_relu_conv3x3(inputs, affine.scale, affine.shift, convolution, height, width,
                    narrow(storage, 1, channels, growth_rate), of_slot(mean), of_slot(variance));
    channels += growth_rate;
  }
  if (saved_bottlenecks == 0) bottlenecks.clear();
  return bottlenecks;
}

}  // namespace densenet_efficient
