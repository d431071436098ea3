// The native module densenet_efficient._C: what this build is, and the classes that Python uses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "cpu/capability.h"
#include "module_snapshot.h"
#if defined(CUDA_ARCHITECTURES)
#include "cuda/tape/launch_tape.h"
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

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native operators of densenet_efficient, registered as torch.ops.densenet_efficient.";
  module.def("build_info", &densenet_efficient::build_info);
  module.def("cpu_capability", &densenet_efficient::cpu_capability_name);
  densenet_efficient::define_module_snapshot(module);
#if defined(CUDA_ARCHITECTURES)
  densenet_efficient::cuda::define_launch_tape(module);
#endif
}
