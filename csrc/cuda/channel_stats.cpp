#include "cuda/kernels/channel_stats.h"

#include "cuda/host.h"
#include "operators.h"

namespace densenet_efficient::cuda {

using at::Tensor;

void channel_stats(const Tensor& x, const Tensor& mean, const Tensor& variance) {
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

}  // namespace densenet_efficient::cuda
