// What torch and this package ask of the CUDA runtime and of its libraries, answered as by a GPU that does nothing: its
// memory is the host's, every launch is accepted and counted. Functions that are not here do nothing; test only.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "null_gpu.h"

struct null_gpu_counts null_gpu_counts;
int null_gpu_refuses_graphs, null_gpu_refuses_changes;
struct null_gpu_launch null_gpu_latest;
uintptr_t null_gpu_stream;

static const int kMultiprocessors = 132, kSharedMemory = 227 << 10;
static const size_t kMemory = (size_t)8 << 30;
static long names = 1;  // of streams and events
static enum cudaStreamCaptureStatus capture_status = cudaStreamCaptureStatusNone;

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof(*properties));
  strcpy(properties->name, "null GPU");
  properties->major = 9;
  properties->multiProcessorCount = kMultiprocessors;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->totalGlobalMem = kMemory;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = kSharedMemory;
  properties->regsPerMultiprocessor = 65536;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = *greatest = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) { return "an error of the null GPU"; }

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result != NULL) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t size) {
  return posix_memalign(memory, 512, size) ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t size, unsigned flags) { return cudaMalloc(memory, size); }
cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
cudaError_t cudaFreeHost(void* memory) { return free(memory), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) { return *available = *total = kMemory, cudaSuccess; }

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return memcpy(to, from, size), cudaSuccess;
}
static void note_zeros(const void* memory, size_t size) {
  null_gpu_latest = (struct null_gpu_launch){.first_argument = (uintptr_t)memory, .zero_bytes = size};
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t stream) {
  note_zeros(memory, size);
  null_gpu_stream = (uintptr_t)stream;
  return ++null_gpu_counts.launches, cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  return *stream = (cudaStream_t)(names += 8), cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  return *event = (cudaEvent_t)(names += 8), cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) { return ++null_gpu_counts.waits, cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return ++null_gpu_counts.waits, cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return ++null_gpu_counts.waits, cudaSuccess; }

// Torch's own kernels
static __thread struct {
  dim3 grid, block;
  size_t shared;
  struct CUstream_st* stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configuration.grid = grid, configuration.block = block;
  configuration.shared = shared, configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
  *(struct CUstream_st**)stream = configuration.stream;
  return cudaSuccess;
}
void** __cudaRegisterFatBinary(void* binary) {
  static void* registered;
  return &registered;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* kernel) {
  memset(attributes, 0, sizeof(*attributes));
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads,
                                                                   size_t shared, unsigned flags) {
  return *blocks = 2, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return ++null_gpu_counts.launches, cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return ++null_gpu_counts.launches, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* configured, const void* kernel, void** arguments) {
  return ++null_gpu_counts.launches, cudaSuccess;
}

// Graphs: a graph is the number of its nodes. None may come or go while a stream is captured.
static int is_captured(void) {
  if (capture_status == cudaStreamCaptureStatusNone) return 0;
  capture_status = cudaStreamCaptureStatusInvalidated;
  return 1;
}

void* null_gpu_add_node(void* graph, void* const* others, size_t count) {
  long* nodes = graph;
  const int follows = *nodes == 0 ? count == 0 : count == 1 && others[0] == (void*)(8 * *nodes);
  null_gpu_counts.unordered_nodes += !follows;
  return (void*)(8 * ++*nodes);
}
cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned flags) {
  return *graph = calloc(1, sizeof(long)), cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (is_captured()) return cudaErrorStreamCaptureUnsupported;
  return free(graph), cudaSuccess;
}
cudaError_t cudaGraphAddMemsetNode(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after, size_t count,
                                   const struct cudaMemsetParams* parameters) {
  *node = null_gpu_add_node(graph, (void* const*)after, count);
  note_zeros(parameters->dst, parameters->elementSize * parameters->width * parameters->height);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  if (is_captured()) return cudaErrorStreamCaptureUnsupported;
  if (null_gpu_refuses_graphs) return cudaErrorMemoryAllocation;
  ++null_gpu_counts.graphs;
  *executable = malloc(sizeof(long));
  *(long*)*executable = *(long*)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecMemsetNodeSetParams(cudaGraphExec_t executable, cudaGraphNode_t node,
                                             const struct cudaMemsetParams* parameters) {
  note_zeros(parameters->dst, parameters->elementSize * parameters->width * parameters->height);
  return ++null_gpu_counts.changed_launches, null_gpu_refuses_changes ? cudaErrorNotSupported : cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  if (is_captured()) return cudaErrorStreamCaptureUnsupported;
  --null_gpu_counts.graphs;
  return free(executable), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (is_captured()) return cudaErrorStreamCaptureUnsupported;
  null_gpu_counts.launches_in_graphs += *(long*)executable;
  null_gpu_stream = (uintptr_t)stream;
  return ++null_gpu_counts.graph_launches, cudaSuccess;
}

// Capture
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  return capture_status = cudaStreamCaptureStatusActive, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const int is_valid = capture_status == cudaStreamCaptureStatusActive;
  capture_status = cudaStreamCaptureStatusNone;
  return is_valid ? cudaGraphCreate(graph, 0) : cudaErrorStreamCaptureInvalidated;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  return *status = capture_status, cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
  *status = capture_status;
  if (id != NULL) *id = 1;
  return cudaSuccess;
}

// cuBLAS
int cublasCreate_v2(void** handle) { return *handle = malloc(1), 0; }
int cublasLtMatmulAlgoGetHeuristic(void* handle, void* operation, void* a, void* b, void* c, void* d, void* preference,
                                   int wanted, void* results, int* found) {
  return *found = 1, 0;
}
