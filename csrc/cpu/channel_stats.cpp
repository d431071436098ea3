#include "cpu/kernels/channel_stats.h"

#include "checks.h"
#include "operators.h"

namespace densenet_efficient {

using at::Tensor;

void channel_stats(const Tensor& x, const Tensor& mean, const Tensor& variance) {
  const int64_t rows = x.size(0), channels = x.size(1);
  check_matrix(x, "x", rows, channels, x);
  check_vector(mean, "mean", channels, x);
  check_vector(variance, "variance", channels, x);
  ChannelStats arguments{};
  arguments.dtype = x.scalar_type();
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.stride(0);
  arguments.rows = rows;
  arguments.channels = channels;
  arguments.mean = mean.data_ptr();
  arguments.variance = variance.data_ptr();
  DISPATCH_CAPABILITY(arguments.dtype, channel_stats)(arguments);
}

}  // namespace densenet_efficient
