#include <ATen/core/List.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "checks.h"
#include "cpu/kernels/bn_relu_conv1x1.h"
#include "cpu/kernels/bn_relu_conv3x3.h"

namespace densenet_efficient {
namespace {

using at::Tensor;

// The bytes of a packed weight for storage of ``dtype``.
int64_t packed_bytes(at::ScalarType dtype, int64_t kernel, int64_t channels, int64_t outputs) {
  return kernel == 1 ? DISPATCH_CAPABILITY(conv1x1_packed_bytes)(dtype, channels, outputs)
                     : DISPATCH_CAPABILITY(conv3x3_packed_bytes)(dtype, channels, outputs);
}

Tensor pack(const Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && (weight.size(2) == 1 || weight.size(2) == 3),
              "weight must have shape [K, C, 1, 1] or [K, C, 3, 3], got ", weight.sizes());
  const int64_t outputs = weight.size(0), channels = weight.size(1), kernel = weight.size(2);
  const Tensor dense = weight.to(dtype == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  Tensor packed = at::empty({packed_bytes(dtype, kernel, channels, outputs)}, at::kByte);
  const auto run = kernel == 1 ? DISPATCH_CAPABILITY(pack_conv1x1) : DISPATCH_CAPABILITY(pack_conv3x3);
  run(dtype, dense.const_data_ptr(), channels, outputs, packed.data_ptr());
  return packed;
}

void check_packed(const Tensor& packed, at::ScalarType dtype, int64_t kernel, int64_t channels, int64_t outputs) {
  const int64_t bytes = packed_bytes(dtype, kernel, channels, outputs);
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.numel() == bytes,
              "packed must be what packed_weight gives for ", dtype, " and a weight [", outputs, ", ", channels, ", ",
              kernel, ", ", kernel, "]: ", bytes, " bytes, got ", packed.scalar_type(), " of shape ", packed.sizes());
}

// Columns of a matrix in memory.
struct Columns {
  void* data;
  int64_t stride, columns;
};

// What the two convolutions have in common: their input, its affine map, the packed weight and the output.
template <typename Forward>
Forward arguments_of(at::ScalarType dtype, const Columns& x, const void* scale, const void* shift, const Tensor& packed,
                     const Columns& out) {
  Forward arguments{};
  arguments.dtype = dtype;
  arguments.x = x.data;
  arguments.x_stride = x.stride;
  arguments.channels = x.columns;
  arguments.outputs = out.columns;
  arguments.scale = scale;
  arguments.shift = shift;
  arguments.packed = packed.const_data_ptr();
  arguments.out = out.data;
  arguments.out_stride = out.stride;
  return arguments;
}

void conv1x1(at::ScalarType dtype, int64_t rows, const Columns& x, const void* scale, const void* shift,
             const Tensor& packed, const Columns& out) {
  check_packed(packed, dtype, 1, x.columns, out.columns);
  auto arguments = arguments_of<Conv1x1Forward>(dtype, x, scale, shift, packed, out);
  arguments.rows = rows;
  DISPATCH_CAPABILITY(bn_relu_conv1x1)(arguments);
}

Columns all_columns(const Tensor& matrix) { return {matrix.data_ptr(), matrix.stride(0), matrix.size(1)}; }

void conv1x1_packed(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& packed,
                    const Tensor& out) {
  check_matrix(x, "x", x.size(0), x.size(1), x);
  check_matrix(out, "out", x.size(0), out.size(1), x);
  check_vector(scale, "scale", x.size(1), x);
  check_vector(shift, "shift", x.size(1), x);
  conv1x1(x.scalar_type(), x.size(0), all_columns(x), scale.const_data_ptr(), shift.const_data_ptr(), packed,
          all_columns(out));
}

// One image after the other at this size.
struct Images {
  int64_t number, height, width;
};

void conv3x3(at::ScalarType dtype, const Images& images, const Columns& x, const void* scale, const void* shift,
             const Tensor& packed, const Columns& out) {
  check_packed(packed, dtype, 3, x.columns, out.columns);
  auto arguments = arguments_of<Conv3x3Forward>(dtype, x, scale, shift, packed, out);
  arguments.images = images.number;
  arguments.height = images.height;
  arguments.width = images.width;
  DISPATCH_CAPABILITY(bn_relu_conv3x3)(arguments);
}

// The scale and shift of an affine map [4, channels] (see batch_norm_affine).
std::pair<const void*, const void*> scale_and_shift(const Tensor& affine, int64_t channels, const Tensor& storage) {
  TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 4 && affine.size(1) == channels && affine.is_contiguous() &&
                  affine.scalar_type() == accumulation_dtype(storage),
              "affines must be contiguous ", accumulation_dtype(storage), " of shape [4, ", channels, "], got ",
              affine.scalar_type(), " of shape ", affine.sizes());
  const auto* rows = static_cast<const char*>(affine.const_data_ptr());
  const int64_t row = channels * static_cast<int64_t>(affine.element_size());
  return {rows + 2 * row, rows + 3 * row};
}

// Runs all layers of a dense block whose first ``channels`` columns of ``storage`` are its input.
void block(const Tensor& storage, int64_t channels, int64_t height, int64_t width, int64_t bottleneck_channels,
           const c10::List<Tensor>& affines, const c10::List<Tensor>& packed) {
  const int64_t rows = storage.size(0), total = storage.size(1);
  check_matrix(storage, "storage", rows, total, storage);
  const Images images{check_images(storage, "storage", height, width), height, width};
  const size_t convolutions = bottleneck_channels > 0 ? 2 : 1, layers = packed.size() / convolutions;
  TORCH_CHECK(affines.size() == packed.size() && layers > 0 && layers * convolutions == packed.size(),
              "affines and packed must have one entry per convolution of each layer, got ", affines.size(), " and ",
              packed.size());
  TORCH_CHECK(channels > 0 && channels < total && (total - channels) % static_cast<int64_t>(layers) == 0,
              "storage must have ", channels, " channels and as many more from each of ", layers, " layers, got ",
              total);
  const int64_t growth_rate = (total - channels) / static_cast<int64_t>(layers);
  const Tensor scratch = at::empty({bottleneck_channels > 0 ? rows : 0, bottleneck_channels}, storage.options());
  const Columns bottleneck = all_columns(scratch);
  const auto dtype = storage.scalar_type();
  auto* const data = static_cast<char*>(storage.data_ptr());
  for (size_t index = 0; index < packed.size(); channels += growth_rate) {
    Columns x{data, storage.stride(0), channels};
    if (bottleneck_channels > 0) {
      const auto [scale, shift] = scale_and_shift(affines[index], channels, storage);
      conv1x1(dtype, rows, x, scale, shift, packed[index++], bottleneck);
      x = bottleneck;
    }
    const auto [scale, shift] = scale_and_shift(affines[index], x.columns, storage);
    const Columns slot{data + channels * static_cast<int64_t>(storage.element_size()), storage.stride(0), growth_rate};
    conv3x3(dtype, images, x, scale, shift, packed[index++], slot);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(densenet_efficient, CPU, library) {
  library.impl("packed_weight", &pack);
  library.impl("bn_relu_conv1x1_packed", &conv1x1_packed);
  library.impl("dense_block_inference", &block);
}

}  // namespace densenet_efficient
