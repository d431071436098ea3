// The native module densenet_efficient._C: every operator's schema, and what this build is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu/capability.h"

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
#else
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace
}  // namespace densenet_efficient

// Schemas only: every operator registers its implementation beside it, in csrc/cpu and csrc/cuda.
TORCH_LIBRARY(densenet_efficient, library) {}

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of densenet_efficient, registered as torch.ops.densenet_efficient.";
  module.def("build_info", &densenet_efficient::build_info);
  module.def("cpu_capability", &densenet_efficient::cpu_capability_name);
}
