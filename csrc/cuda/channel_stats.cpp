#include "cuda/kernels/channel_stats.h"

#include <torch/library.h>

#include "cuda/host.h"

namespace densenet_efficient::cuda {
namespace {

using at::Tensor;

void stats(const Tensor& x, const Tensor& mean, const Tensor& variance) {
  check_storage_dtype(x);
  const int64_t rows = x.size(0), columns = x.size(1);
  check_matrix(x, "x", rows, columns, x);
  check_vector(mean, "mean", columns, x);
  check_vector(variance, "variance", columns, x);
  const ChannelStats arguments{
      .dtype = x.scalar_type(),
      .x = matrix_of(x),
      .rows = rows,
      .columns = columns,
      .mean = mean.data_ptr(),
      .variance = variance.data_ptr(),
  };
  launch_with_partials(x, partials_of(arguments),
                       [&](void* partials, cudaStream_t stream) { channel_stats(arguments, partials, stream); });
}

}  // namespace

TORCH_LIBRARY_IMPL(densenet_efficient, CUDA, library) { library.impl("channel_stats", &stats); }

}  // namespace densenet_efficient::cuda
