#include "cuda/kernels/write_with_statistics.h"

#include "cuda/host.h"
#include "operators.h"

namespace densenet_efficient::cuda {

using at::Tensor;

void write_with_statistics(const Tensor& x, const Tensor& out, const Tensor& mean, const Tensor& variance) {
  check_storage_dtype(x);
  check_flat_images(x, "x");
  const int64_t columns = x.size(1), pixels = x.size(2), rows = x.size(0) * pixels;
  check_matrix(out, "out", rows, columns, x);
  check_pixels(out);
  check_vector(mean, "mean", columns, x);
  check_vector(variance, "variance", columns, x);
  const WriteWithStatistics arguments{
      .dtype = x.scalar_type(),
      .x = {.data = x.const_data_ptr(),
            .image_stride = x.stride(0),
            .channel_stride = x.stride(1),
            .pixel_stride = x.stride(2),
            .pixels = static_cast<uint32_t>(pixels)},
      .out = mutable_matrix_of(out),
      .rows = rows,
      .columns = columns,
      .mean = mean.data_ptr(),
      .variance = variance.data_ptr(),
  };
  launch_with_partials(x, partials_of(arguments), [&](void* partials, cudaStream_t stream) {
    write_with_statistics(arguments, partials, stream);
  });
}

}  // namespace densenet_efficient::cuda
