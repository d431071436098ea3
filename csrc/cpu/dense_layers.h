// The layers of a dense block as a native loop over them knows them.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

namespace densenet_efficient {

// ``x * scale + shift``; all [C].
struct Affine {
  at::Tensor mean, rstd, scale, shift;
};

struct Norm {
  at::Tensor weight, bias;  // [C]
  double eps;
  std::optional<at::Tensor> running_mean, running_variance;  // where they are used instead of the batch's

  bool uses_batch() const { return !running_mean; }

  // The map of this norm, given the batch's statistics [C].
  Affine affine(const at::Tensor& mean, const at::Tensor& variance) const;
};

// BN-ReLU-conv1x1-BN-ReLU-conv3x3, or BN-ReLU-conv3x3 without the second pair.
struct DenseLayer {
  Norm norm1;
  at::Tensor conv1;
  std::optional<Norm> norm2;
  std::optional<at::Tensor> conv2;

  int64_t growth_rate() const { return conv2.value_or(conv1).size(0); }
};

// The norms and convolutions of a block's layers, in their order, as an operator takes them: one of each list per norm,
// but of ``running`` mean and variance.
struct LayerArguments {
  at::TensorList weights, biases;
  at::ArrayRef<double> epsilons;
  const c10::List<std::optional<at::Tensor>>& running;
  at::TensorList convolutions;
};

// Of ``count`` layers. Raises RuntimeError where the lists have other lengths.
std::vector<DenseLayer> read_layers(const LayerArguments& arguments, size_t count);

// The channels in front of the layers' own in a storage of ``total``.
int64_t input_channels(const std::vector<DenseLayer>& layers, int64_t total);

}  // namespace densenet_efficient
