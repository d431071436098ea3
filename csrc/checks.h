// Argument checks of the host functions: an operator names the argument that is wrong and what was expected.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace densenet_efficient {

inline at::ScalarType accumulation_dtype(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A matrix [rows, columns] of ``like``'s dtype and device, with unit column stride and rows that do not overlap.
inline void check_matrix(const at::Tensor& matrix, const char* name, int64_t rows, int64_t columns,
                         const at::Tensor& like) {
  TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns, name, " must have shape [",
              rows, ", ", columns, "], got ", matrix.sizes());
  TORCH_CHECK(matrix.device() == like.device(), "Expected all tensors to be on the same device, but ", name, " is on ",
              matrix.device(), " and x on ", like.device());
  TORCH_CHECK(matrix.scalar_type() == like.scalar_type(), name, " must be ", like.scalar_type(), " as x is, got ",
              matrix.scalar_type());
  TORCH_CHECK(columns <= 1 || matrix.stride(1) == 1, name, " must have unit column stride, got ", matrix.strides());
  TORCH_CHECK(rows <= 1 || matrix.stride(0) >= columns, name, " must have rows that do not overlap, got strides ",
              matrix.strides());
}

// Images with their pixels in one dimension, of any strides.
inline void check_flat_images(const at::Tensor& images, const char* name) {
  TORCH_CHECK(images.dim() == 3, name, " must have shape [images, channels, pixels], got ", images.sizes());
}

// The number of images of height x width pixels, each a row of ``matrix``. Divides, for the product may overflow.
inline int64_t check_images(const at::Tensor& matrix, const char* name, int64_t height, int64_t width) {
  const int64_t rows = matrix.size(0);
  TORCH_CHECK(height > 0 && width > 0 && rows % height == 0 && rows / height % width == 0, name,
              " must have one row per pixel of ", height, "x", width, " images, got shape ", matrix.sizes());
  return rows / height / width;
}

// A pooling window that fits the images.
inline void check_window(int64_t height, int64_t width, int64_t window_height, int64_t window_width) {
  TORCH_CHECK(1 <= window_height && window_height <= height && 1 <= window_width && window_width <= width,
              "Expected a window that fits the images of ", height, "x", width, ", got ", window_height, "x",
              window_width);
}

inline void check_accumulation_dtype(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == accumulation_dtype(tensor), name, " must be float32 or float64, got ",
              tensor.scalar_type());
}

// A contiguous vector [size] of the accumulation dtype of ``like``.
inline void check_vector(const at::Tensor& vector, const char* name, int64_t size, const at::Tensor& like) {
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && (size <= 1 || vector.stride(0) == 1), name,
              " must be contiguous of shape [", size, "], got ", vector.sizes());
  TORCH_CHECK(vector.device() == like.device() && vector.scalar_type() == accumulation_dtype(like), name, " must be ",
              accumulation_dtype(like), " on ", like.device(), ", got ", vector.scalar_type(), " on ", vector.device());
}

// A norm's vector [channels] of any floating dtype, made contiguous, for an ``affine`` [4, channels].
inline at::Tensor dense_norm_vector(const at::Tensor& vector, const char* name, const at::Tensor& affine) {
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) == affine.size(1), name, " must have shape [", affine.size(1),
              "], got ", vector.sizes());
  TORCH_CHECK(vector.device() == affine.device(), "Expected all tensors to be on the same device, but ", name,
              " is on ", vector.device(), " and affine on ", affine.device());
  return vector.contiguous();
}

// The data of an optional vector [size]; null where it is not given.
inline void* optional_vector(const std::optional<at::Tensor>& vector, const char* name, int64_t size,
                             const at::Tensor& like) {
  if (!vector) return nullptr;
  check_vector(*vector, name, size, like);
  return vector->data_ptr();
}

inline bool is_contiguous_or_channels_last(const at::Tensor& weight) {
  return weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// A convolution's weight [outputs, channels, kernel, kernel] in the accumulation dtype of ``like``, contiguous or
// channels-last.
inline at::Tensor checked_weight(const at::Tensor& weight, int64_t outputs, int64_t channels, int64_t kernel,
                                 const at::Tensor& like) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == outputs && weight.size(1) == channels &&
                  weight.size(2) == kernel && weight.size(3) == kernel,
              "weight must have shape [", outputs, ", ", channels, ", ", kernel, ", ", kernel, "], got ",
              weight.sizes());
  TORCH_CHECK(channels > 0, "weight must have input channels, got ", weight.sizes());
  TORCH_CHECK(weight.device() == like.device(), "Expected all tensors to be on the same device, but weight is on ",
              weight.device(), " and x on ", like.device());
  const at::Tensor converted = weight.to(accumulation_dtype(like));
  return is_contiguous_or_channels_last(converted) ? converted : converted.contiguous();
}

// The data of a weight's optional gradient, contiguous or channels-last; null where it is not given.
inline void* optional_grad_weight(const std::optional<at::Tensor>& grad_weight, const at::Tensor& weight,
                                  const at::Tensor& like) {
  if (!grad_weight) return nullptr;
  TORCH_CHECK(grad_weight->sizes() == weight.sizes() && is_contiguous_or_channels_last(*grad_weight) &&
                  grad_weight->scalar_type() == accumulation_dtype(like),
              "grad_weight must be contiguous or channels-last ", accumulation_dtype(like), " of shape ",
              weight.sizes(), ", got ", grad_weight->scalar_type(), " of shape ", grad_weight->sizes(), " and strides ",
              grad_weight->strides());
  return grad_weight->data_ptr();
}

}  // namespace densenet_efficient
