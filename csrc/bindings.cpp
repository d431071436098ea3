// The native module densenet_efficient._C: every operator's schema, and what this build is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu/capability.h"
#include "module_snapshot.h"
#if defined(CUDA_ARCHITECTURES)
#include "cuda/launch_tape.h"
#endif

namespace py = pybind11;

namespace densenet_efficient {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = DENSENET_EFFICIENT_VERSION;
  info["torch"] = TORCH_VERSION;
  info["compiler"] = __VERSION__;
  info["cpu_capabilities"] = compiled_cpu_capabilities();
#if defined(CUDA_ARCHITECTURES)
  info["cuda_architectures"] = CUDA_ARCHITECTURES;
  info["why_not_cuda"] = py::none();
#else
  info["cuda_architectures"] = py::none();
  info["why_not_cuda"] = WHY_NOT_CUDA;
#endif
  return info;
}

}  // namespace
}  // namespace densenet_efficient

// Schemas only: every operator registers its implementation beside it, in csrc/cpu and csrc/cuda. What they compute
// stands in densenet_efficient/kernels/reference.py.
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
  // At inference: weights packed once for many calls, and a stage on a few images at a time.
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
      "Tensor[] convolutions, bool save_bottlenecks) -> Tensor[]");
  library.def(
      "dense_layers_backward(Tensor(a!) grad, Tensor storage, int height, int width, Tensor statistics, "
      "Tensor bottleneck_statistics, Tensor[] bottlenecks, Tensor[] weights, Tensor[] biases, float[] epsilons, "
      "Tensor?[] running, Tensor[] convolutions, Tensor(b!) slope, Tensor(c!) offset, bool nothing_to_project, "
      "bool[] needed, bool input_needed) -> Tensor?[]");
  library.def("empty_kept(Tensor like, int[] size, bool channels_last=False) -> Tensor");
  library.def("return_freed_memory() -> ()");
  library.def("cpu_product_rate(ScalarType dtype, float seconds) -> float");
}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of densenet_efficient, registered as torch.ops.densenet_efficient.";
  module.def("build_info", &densenet_efficient::build_info);
  module.def("cpu_capability", &densenet_efficient::cpu_capability_name);
  py::class_<densenet_efficient::ModuleSnapshot>(module, "ModuleSnapshot")
      .def(py::init<const py::list&, bool>(), py::arg("modules"), py::kw_only(), py::arg("with_values"))
      .def("matches", &densenet_efficient::ModuleSnapshot::matches);
#if defined(CUDA_ARCHITECTURES)
  densenet_efficient::cuda::define_launch_tape(module);
#endif
}
