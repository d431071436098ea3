#include "cpu/kernels/write_with_statistics.h"

#include "checks.h"
#include "operators.h"

namespace densenet_efficient {

using at::Tensor;

void write_with_statistics(const Tensor& x, const Tensor& out, const Tensor& mean, const Tensor& variance) {
  check_flat_images(x, "x");
  const int64_t images = x.size(0), channels = x.size(1), pixels = x.size(2);
  check_matrix(out, "out", images * pixels, channels, x);
  check_vector(mean, "mean", channels, x);
  check_vector(variance, "variance", channels, x);
  WriteWithStatistics arguments{};
  arguments.dtype = x.scalar_type();
  arguments.x = x.const_data_ptr();
  arguments.image_stride = x.stride(0);
  arguments.channel_stride = x.stride(1);
  arguments.pixel_stride = x.stride(2);
  arguments.images = images;
  arguments.channels = channels;
  arguments.pixels = pixels;
  arguments.out = out.data_ptr();
  arguments.out_stride = out.stride(0);
  arguments.mean = mean.data_ptr();
  arguments.variance = variance.data_ptr();
  DISPATCH_CAPABILITY(arguments.dtype, write_with_statistics)(arguments);
}

}  // namespace densenet_efficient
