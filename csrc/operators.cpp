// Every operator: its schema, and what implements it on each device. All in one place, for the header that they are
// registered with takes longer to compile than an operator.
#include "operators.h"

#include <torch/library.h>

#if defined(CUDA_ARCHITECTURES)
#include "cuda/register_operators.h"
#endif

namespace densenet_efficient {

TORCH_LIBRARY(densenet_efficient, library) {
  library.def(
      "batch_norm_affine(Tensor mean, Tensor variance, Tensor weight, Tensor bias, float eps, Tensor(a!) affine) -> "
      "()");
  library.def(
      "batch_norm_gradients(Tensor sum_grad, Tensor sum_grad_x, Tensor rstd, Tensor scale, int count, "
      "Tensor(a!)? grad_weight, Tensor(b!)? slope, Tensor(c!)? offset) -> ()");
  library.def("channel_stats(Tensor x, Tensor(a!) mean, Tensor(b!) variance) -> ()");
  library.def("write_with_statistics(Tensor x, Tensor(a!) out, Tensor(b!) mean, Tensor(c!) variance) -> ()");
  library.def(
      "bn_relu_conv1x1(Tensor x, Tensor scale, Tensor shift, Tensor weight, Tensor(a!) out, Tensor(b!)? mean, "
      "Tensor(c!)? variance) -> ()");
  library.def(
      "bn_relu_conv1x1_backward(Tensor out_grad, Tensor out, Tensor out_mean, Tensor out_slope, Tensor out_offset, "
      "Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, Tensor(a!)? grad, Tensor(b!)? grad_weight, "
      "Tensor(c!)? sum_grad, Tensor(d!)? sum_grad_x) -> ()");
  library.def(
      "bn_relu_conv3x3(Tensor x, Tensor scale, Tensor shift, Tensor weight, int height, int width, Tensor(a!) out, "
      "Tensor(b!)? mean, Tensor(c!)? variance) -> ()");
  library.def(
      "bn_relu_conv3x3_backward(Tensor out_grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, Tensor weight, "
      "int height, int width, Tensor(a!)? grad, bool accumulate, Tensor(b!)? grad_weight, Tensor(c!)? sum_grad, "
      "Tensor(d!)? sum_grad_x) -> ()");
  library.def("project_gradient(Tensor(a!) grad, Tensor x, Tensor mean, Tensor slope, Tensor offset) -> ()");
  library.def(
      "bn_relu_avg_pool(Tensor x, Tensor scale, Tensor shift, int height, int width, int window_height, "
      "int window_width, Tensor(a!) out) -> ()");
  library.def(
      "bn_relu_avg_pool_backward(Tensor out_grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, int height, "
      "int width, int window_height, int window_width, Tensor(a!)? grad, bool accumulate, Tensor(b!) sum_grad, "
      "Tensor(c!) sum_grad_x) -> ()");
  library.def("bn_relu_max_pool(Tensor x, Tensor scale, Tensor shift, int height, int width, Tensor(a!) out) -> ()");
  library.def(
      "bn_relu_max_pool_backward(Tensor out_grad, Tensor x, Tensor mean, Tensor scale, Tensor shift, int height, "
      "int width, Tensor(a!) grad, Tensor(b!) sum_grad, Tensor(c!) sum_grad_x) -> ()");
  // At inference: the stem, weights packed once for many calls, and a stage on a few images at a time.
  library.def(
      "conv_bn_relu_max_pool(Tensor x, Tensor weight, int[2] stride, int[2] padding, Tensor scale, Tensor shift, "
      "Tensor(a!) out) -> ()");
  library.def("packed_weight(Tensor weight, ScalarType dtype) -> Tensor");
  library.def(
      "dense_stage_inference(Tensor x, int height, int width, int bottleneck_channels, int growth_rate, "
      "Tensor[] affines, Tensor[] packed, Tensor? exit_affine, Tensor? exit_packed, int[2] window, "
      "Tensor(a!)? features, Tensor(b!)? out) -> ()");
  // In training: the loop over a block's layers (densenet_efficient/dense_layers.py), with the lists of their norms, in
  // order, of each norm's running mean and variance (None where it uses the batch's), and of their convolutions.
  library.def(
      "dense_layers(Tensor(a!) storage, int height, int width, Tensor(b!) statistics, bool with_statistics, "
      "Tensor(c!) bottleneck_statistics, Tensor[] weights, Tensor[] biases, float[] epsilons, Tensor?[] running, "
      "Tensor[] convolutions, int saved_bottlenecks) -> Tensor[]");
  library.def(
      "dense_layers_backward(Tensor(a!) grad, Tensor storage, int height, int width, Tensor statistics, "
      "Tensor bottleneck_statistics, Tensor[] bottlenecks, Tensor[] weights, Tensor[] biases, float[] epsilons, "
      "Tensor?[] running, Tensor[] convolutions, Tensor(b!) slope, Tensor(c!) offset, bool nothing_to_project, "
      "bool[] needed, bool input_needed) -> Tensor?[]");
  library.def("empty_kept(Tensor like, int[] size, bool channels_last=False) -> Tensor");
  library.def("return_freed_memory() -> ()");
  library.def("cpu_product_rate(ScalarType dtype, float seconds) -> float");
}

TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("batch_norm_affine", &batch_norm_affine);
  library.impl("batch_norm_gradients", &batch_norm_gradients);
  library.impl("channel_stats", &channel_stats);
  library.impl("write_with_statistics", &write_with_statistics);
  library.impl("bn_relu_conv1x1", &bn_relu_conv1x1);
  library.impl("bn_relu_conv1x1_backward", &bn_relu_conv1x1_backward);
  library.impl("bn_relu_conv3x3", &bn_relu_conv3x3);
  library.impl("bn_relu_conv3x3_backward", &bn_relu_conv3x3_backward);
  library.impl("project_gradient", &project_gradient);
  library.impl("bn_relu_avg_pool", &bn_relu_avg_pool);
  library.impl("bn_relu_avg_pool_backward", &bn_relu_avg_pool_backward);
  library.impl("bn_relu_max_pool", &bn_relu_max_pool);
  library.impl("bn_relu_max_pool_backward", &bn_relu_max_pool_backward);
  library.impl("conv_bn_relu_max_pool", &conv_bn_relu_max_pool);
  library.impl("packed_weight", &packed_weight);
  library.impl("dense_stage_inference", &dense_stage_inference);
  library.impl("dense_layers", &dense_layers);
  library.impl("dense_layers_backward", &dense_layers_backward);
  library.impl("empty_kept", &empty_kept_like);
}

// No tensor goes in, so that there is no device to dispatch on.
TORCH_LIBRARY_IMPL(densenet_efficient, CompositeExplicitAutograd, library) {
  library.impl("return_freed_memory", &return_freed_memory);
  library.impl("cpu_product_rate", &cpu_product_rate);
}

#if defined(CUDA_ARCHITECTURES)
TORCH_LIBRARY_IMPL(densenet_efficient, CUDA, library) { cuda::register_operators(library); }
#endif

}  // namespace densenet_efficient
