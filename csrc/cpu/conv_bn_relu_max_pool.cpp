#include "cpu/kernels/conv_bn_relu_max_pool.h"

#include <c10/util/safe_numerics.h>

#include <initializer_list>
#include <limits>

#include "checks.h"
#include "cpu/kernels/bn_relu_max_pool.h"
#include "operators.h"

namespace densenet_efficient {
namespace {

using at::Tensor;

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

// Whether no memory has so many elements.
bool is_beyond_memory(std::initializer_list<int64_t> sizes) {
  uint64_t elements;
  return c10::safe_multiplies_u64(sizes, &elements) || elements > kMost / sizeof(double);
}

// Outputs along a dimension of a convolution.
int64_t convolved(int64_t size, int64_t kernel, int64_t stride, int64_t padding) {
  TORCH_CHECK(stride > 0 && padding >= 0, "Expected a stride above and a padding not below 0, got ", stride, " and ",
              padding);
  TORCH_CHECK(padding <= (kMost - size) / 2, "Expected a padding that memory can hold, got ", padding);
  TORCH_CHECK(size + 2 * padding >= kernel, "Expected images that the kernel fits in, got ", size, " pixels, a kernel ",
              "of ", kernel, " and a padding of ", padding);
  return (size + 2 * padding - kernel) / stride + 1;
}

}  // namespace

// out [N * H' * W', K] = the maximum pooling of relu(conv(x) * scale + shift), whose convolution is rounded to the
// dtype of ``x`` [N, C, H, W], for a weight [K, C, kh, kw] of this dtype; both of any strides.
void conv_bn_relu_max_pool(const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
                           const Tensor& scale, const Tensor& shift, const Tensor& out) {
  TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x must have shape [N, C, H, W] and elements, got ", x.sizes());
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) && weight.numel() > 0, "weight must have shape [K, ",
              x.size(1), ", kh, kw], got ", weight.sizes());
  TORCH_CHECK(weight.device() == x.device() && weight.scalar_type() == x.scalar_type(), "weight must be ",
              x.scalar_type(), " on ", x.device(), " as x is, got ", weight.scalar_type(), " on ", weight.device());
  TORCH_CHECK(stride.size() == 2 && padding.size() == 2, "Expected a stride and a padding of two sizes, got ", stride,
              " and ", padding);
  ConvMaxPoolForward arguments{};
  arguments.dtype = x.scalar_type();
  arguments.x = x.const_data_ptr();
  arguments.x_stride = x.strides().data();
  arguments.images = x.size(0);
  arguments.channels = x.size(1);
  arguments.height = x.size(2);
  arguments.width = x.size(3);
  arguments.weight = weight.const_data_ptr();
  arguments.weight_stride = weight.strides().data();
  arguments.outputs = weight.size(0);
  for (int axis = 0; axis < 2; axis++) {
    arguments.kernel[axis] = weight.size(2 + axis);
    arguments.stride[axis] = stride[axis];
    arguments.padding[axis] = padding[axis];
  }
  arguments.conv_height = convolved(arguments.height, weight.size(2), stride[0], padding[0]);
  arguments.conv_width = convolved(arguments.width, weight.size(3), stride[1], padding[1]);
  arguments.out_height = max_pooled(arguments.conv_height);
  arguments.out_width = max_pooled(arguments.conv_width);
  // The kernel lays out its rows with their padding, and the product of out's sizes may be that of another shape.
  TORCH_CHECK(!is_beyond_memory({arguments.height + 2 * padding[0], arguments.width + 2 * padding[1], x.size(1)}) &&
                  !is_beyond_memory({arguments.images, arguments.out_height, arguments.out_width, arguments.outputs}),
              "Expected a padding that memory can hold, got ", padding, " for x ", x.sizes());
  check_vector(scale, "scale", arguments.outputs, x);
  check_vector(shift, "shift", arguments.outputs, x);
  arguments.scale = scale.const_data_ptr();
  arguments.shift = shift.const_data_ptr();
  check_matrix(out, "out", arguments.images * arguments.out_height * arguments.out_width, arguments.outputs, x);
  arguments.out = out.data_ptr();
  arguments.out_stride = out.stride(0);
  DISPATCH_CAPABILITY(arguments.dtype, conv_bn_relu_max_pool)(arguments);
}

}  // namespace densenet_efficient
