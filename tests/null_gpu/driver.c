// What Triton and this package ask of the CUDA driver; as runtime.c.
#include <cuda.h>
#include <stdlib.h>

#include "null_gpu.h"

#undef cuGraphAddKernelNode  // which are asked for by these names
#undef cuGraphExecKernelNodeSetParams

CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)8, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = 0, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      return *value = 9, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      return *value = 227 << 10, CUDA_SUCCESS;
    default:
      return *value = 0, CUDA_SUCCESS;
  }
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = malloc(1), CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return *function = malloc(1), CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;
}
static void note(CUDA_KERNEL_NODE_PARAMS launch) {
  null_gpu_latest = (struct null_gpu_launch){
      .kernel = (uintptr_t)launch.func,
      .blocks = {launch.gridDimX, launch.gridDimY, launch.gridDimZ},
      .threads = {launch.blockDimX, launch.blockDimY, launch.blockDimZ},
      .shared_bytes = launch.sharedMemBytes,
      .first_argument = *(uintptr_t*)launch.kernelParams[0],
  };
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* configured, CUfunction kernel, void** arguments, void** extra) {
  return ++null_gpu_counts.launches, CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                        unsigned threads_z, unsigned shared, CUstream stream, void** arguments, void** extra) {
  note((CUDA_KERNEL_NODE_PARAMS){kernel, x, y, z, threads, threads_y, threads_z, shared, arguments});
  null_gpu_stream = (uintptr_t)stream;
  return ++null_gpu_counts.launches, CUDA_SUCCESS;
}
CUresult cuGraphAddKernelNode(CUgraphNode* node, CUgraph graph, const CUgraphNode* after, size_t count,
                              const CUDA_KERNEL_NODE_PARAMS* parameters) {
  *node = null_gpu_add_node(graph, (void* const*)after, count);
  return note(*parameters), CUDA_SUCCESS;
}
CUresult cuGraphExecKernelNodeSetParams(CUgraphExec executable, CUgraphNode node,
                                        const CUDA_KERNEL_NODE_PARAMS* parameters) {
  note(*parameters);
  return ++null_gpu_counts.changed_launches, null_gpu_refuses_changes ? CUDA_ERROR_NOT_SUPPORTED : CUDA_SUCCESS;
}
