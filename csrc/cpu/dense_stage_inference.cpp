#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/kernels/bn_relu_avg_pool.h"
#include "cpu/kernels/bn_relu_conv1x1.h"
#include "cpu/kernels/bn_relu_conv3x3.h"
#include "operators.h"

namespace densenet_efficient {
namespace {

using at::Tensor;

// Of one visit's features and bottleneck: half of the second-level cache of a current server, and more than the L1 of
// any; measured between 256 KiB and 3 MiB.
constexpr int64_t kBytesOfAVisit = 1 << 20;

// The bytes of a packed weight for activations of ``dtype``.
int64_t packed_bytes(at::ScalarType dtype, int64_t kernel, int64_t channels, int64_t outputs) {
  return kernel == 1 ? DISPATCH_CAPABILITY(dtype, conv1x1_packed_bytes)(dtype, channels, outputs)
                     : DISPATCH_CAPABILITY(dtype, conv3x3_packed_bytes)(dtype, channels, outputs);
}

// Rows of a matrix in memory.
struct Rows {
  char* data;
  int64_t stride;
};

Rows rows_of(const Tensor& matrix) {
  return {static_cast<char*>(const_cast<void*>(matrix.const_data_ptr())), matrix.stride(0)};
}

// One image after the other at this size.
struct Images {
  int64_t number, height, width;

  int64_t pixels() const { return height * width; }
  int64_t rows() const { return number * pixels(); }
};

// BN-ReLU of so many channels.
struct Norm {
  const void *scale, *shift;
  int64_t channels;
};

// BN-ReLU and the convolution behind it.
struct Convolution {
  Norm norm;
  const void* packed;
  int64_t packed_bytes, outputs;
};

// What a stage makes of its input: two convolutions per layer, or one without a bottleneck, and its exit.
struct Stage {
  at::ScalarType dtype;
  int64_t element;                                            // bytes
  int64_t channels, total, growth_rate, bottleneck_channels;  // of the input, of all features, of a layer
  std::vector<Convolution> convolutions;
  std::array<int64_t, 2> window;  // of the exit's average pooling, 1x1 where it is none
  Norm exit_norm;
  std::optional<Convolution> exit_conv;  // behind the pooling, or in its place

  // Whether the exit's norm is followed by the pooling, not by the convolution.
  bool pools() const { return !exit_conv || window[0] * window[1] > 1; }
  Images pooled(const Images& images) const {
    return {images.number, images.height / window[0], images.width / window[1]};
  }
  int64_t bytes_of_an_image(const Images& images) const {
    return images.pixels() * (total + bottleneck_channels) * element;
  }
};

// A thread's own memory.
struct Scratch {
  Rows features, bottleneck, pooled;
};

// What every operation here has in common: its input, the norm that it applies, and its output.
template <typename Forward>
Forward forward_of(at::ScalarType dtype, const Rows& x, const Norm& norm, const Rows& out) {
  Forward arguments{};
  arguments.dtype = dtype;
  arguments.x = x.data;
  arguments.x_stride = x.stride;
  arguments.channels = norm.channels;
  arguments.scale = norm.scale;
  arguments.shift = norm.shift;
  arguments.out = out.data;
  arguments.out_stride = out.stride;
  return arguments;
}

template <typename Forward>
Forward forward_of(at::ScalarType dtype, const Rows& x, const Convolution& convolution, const Rows& out) {
  auto arguments = forward_of<Forward>(dtype, x, convolution.norm, out);
  arguments.outputs = convolution.outputs;
  arguments.packed = convolution.packed;
  return arguments;
}

// Lets the weight of the convolution behind an operation come into the cache meanwhile.
template <typename Forward>
void set_next(Forward& arguments, const Convolution* next) {
  if (next == nullptr) return;
  arguments.next = next->packed;
  arguments.next_bytes = next->packed_bytes;
}

template <typename Forward>
void set_images(Forward& arguments, const Images& images) {
  arguments.images = images.number;
  arguments.height = images.height;
  arguments.width = images.width;
}

void conv1x1(at::ScalarType dtype, int64_t rows, const Rows& x, const Convolution& convolution, const Rows& out,
             const Convolution* next = nullptr) {
  auto arguments = forward_of<Conv1x1Forward>(dtype, x, convolution, out);
  arguments.rows = rows;
  set_next(arguments, next);
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_conv1x1)(arguments);
}

void conv3x3(at::ScalarType dtype, const Images& images, const Rows& x, const Convolution& convolution, const Rows& out,
             const Convolution* next) {
  auto arguments = forward_of<Conv3x3Forward>(dtype, x, convolution, out);
  set_next(arguments, next);
  set_images(arguments, images);
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_conv3x3)(arguments);
}

void avg_pool(const Stage& stage, const Images& images, const Rows& x, const Rows& out) {
  auto arguments = forward_of<AvgPoolForward>(stage.dtype, x, stage.exit_norm, out);
  set_images(arguments, images);
  arguments.window_height = stage.window[0];
  arguments.window_width = stage.window[1];
  DISPATCH_CAPABILITY(arguments.dtype, bn_relu_avg_pool)(arguments);
}

void copy_input(const Stage& stage, int64_t rows, const Rows& x, const Rows& features) {
  at::parallel_for(0, rows, 512, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      std::memcpy(features.data + row * features.stride * stage.element, x.data + row * x.stride * stage.element,
                  static_cast<size_t>(stage.channels * stage.element));
    }
  });
}

void run_layers(const Stage& stage, const Images& images, const Rows& features, const Rows& bottleneck) {
  const auto after = [&](size_t index) {
    if (index < stage.convolutions.size()) return &stage.convolutions[index];
    return stage.exit_conv ? &*stage.exit_conv : nullptr;
  };
  char* slot = features.data + stage.channels * stage.element;
  for (size_t index = 0; index < stage.convolutions.size(); slot += stage.growth_rate * stage.element) {
    const Rows* x = &features;
    if (stage.bottleneck_channels > 0) {
      conv1x1(stage.dtype, images.rows(), features, stage.convolutions[index], bottleneck, after(index + 1));
      index++;
      x = &bottleneck;
    }
    conv3x3(stage.dtype, images, *x, stage.convolutions[index], {slot, features.stride}, after(index + 1));
    index++;
  }
}

// The stage on a few images; ``features`` and ``out`` begin with theirs, or have no data.
void run_images(const Stage& stage, const Images& images, const Rows& x, Rows features, const Rows& out,
                const Scratch& scratch) {
  if (features.data == nullptr) features = scratch.features;
  copy_input(stage, images.rows(), x, features);
  run_layers(stage, images, features, scratch.bottleneck);
  if (out.data == nullptr) return;
  if (!stage.exit_conv) return avg_pool(stage, images, features, out);
  if (!stage.pools()) return conv1x1(stage.dtype, images.rows(), features, *stage.exit_conv, out);
  avg_pool(stage, images, features, scratch.pooled);
  conv1x1(stage.dtype, stage.pooled(images).rows(), scratch.pooled, *stage.exit_conv, out);
}

// The part of a matrix that begins with an image of so many rows.
Rows from_image(const Rows& matrix, int64_t image, int64_t rows, int64_t element) {
  if (matrix.data == nullptr) return matrix;
  return {matrix.data + image * rows * matrix.stride * element, matrix.stride};
}

// Every thread takes a few images through the whole stage, in memory that stays in its cache; the last of them, too
// few for all threads, are shared by all.
void run_stage(const Stage& stage, const Images& images, const Rows& x, const Rows& features, const Rows& out) {
  const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t share = std::max<int64_t>(images.number / available, 1);
  const int64_t at_a_time = std::clamp<int64_t>(kBytesOfAVisit / stage.bytes_of_an_image(images), 1, share);
  const int64_t visits = at::divup(images.number, at_a_time), apart = visits / available * available;
  const int64_t threads = std::max<int64_t>(std::min(apart, available), 1);
  const Images most{at_a_time, images.height, images.width};
  const auto options = at::TensorOptions().dtype(stage.dtype);
  const auto allocate = [&](int64_t rows, int64_t columns) { return at::empty({threads, rows, columns}, options); };
  const Tensor own_features = allocate(features.data ? 0 : most.rows(), stage.total);
  const Tensor bottleneck = allocate(most.rows(), stage.bottleneck_channels);
  const Tensor pooled = allocate(stage.pools() && stage.exit_conv ? stage.pooled(most).rows() : 0, stage.total);

  const auto visit = [&](int64_t index, int64_t thread) {
    const auto mine = [&](const Tensor& scratch) {
      return Rows{static_cast<char*>(scratch.data_ptr()) + thread * scratch.stride(0) * stage.element, scratch.size(2)};
    };
    const int64_t first = index * at_a_time;
    const Images some{std::min(at_a_time, images.number - first), images.height, images.width};
    run_images(stage, some, from_image(x, first, images.pixels(), stage.element),
               from_image(features, first, images.pixels(), stage.element),
               from_image(out, first, stage.pooled({1, images.height, images.width}).rows(), stage.element),
               {mine(own_features), mine(bottleneck), mine(pooled)});
  };
  if (available > 1) {
    std::atomic<int64_t> next{0};
    at::parallel_for(0, apart > 0 ? threads : 0, 1, [&](int64_t begin, int64_t end) {
      for (int64_t thread = begin; thread < end; thread++) {
        for (int64_t index; (index = next++) < apart;) visit(index, thread);
      }
    });
  }
  for (int64_t index = available > 1 ? apart : 0; index < visits; index++) visit(index, 0);
}

// That of an affine map [4, channels] (see batch_norm_affine).
Norm make_norm(const Tensor& affine, int64_t channels, const Tensor& x) {
  TORCH_CHECK(affine.dim() == 2 && affine.size(0) == 4 && affine.size(1) == channels && affine.is_contiguous() &&
                  affine.scalar_type() == accumulation_dtype(x),
              "affines must be contiguous ", accumulation_dtype(x), " of shape [4, ", channels, "], got ",
              affine.scalar_type(), " of shape ", affine.sizes());
  const auto* rows = static_cast<const char*>(affine.const_data_ptr());
  const int64_t row = channels * static_cast<int64_t>(affine.element_size());
  return {rows + 2 * row, rows + 3 * row, channels};
}

Convolution make_convolution(const Tensor& affine, const Tensor& packed, int64_t kernel, int64_t channels,
                             int64_t outputs, const Tensor& x) {
  const int64_t bytes = packed_bytes(x.scalar_type(), kernel, channels, outputs);
  TORCH_CHECK(
      packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.numel() == bytes && packed.is_contiguous(),
      "packed must be what packed_weight gives for ", x.scalar_type(), " and a weight [", outputs, ", ", channels, ", ",
      kernel, ", ", kernel, "]: ", bytes, " bytes, got ", packed.scalar_type(), " of shape ", packed.sizes());
  return {make_norm(affine, channels, x), packed.const_data_ptr(), bytes, outputs};
}

}  // namespace

Tensor packed_weight(const Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(2) == weight.size(3) && (weight.size(2) == 1 || weight.size(2) == 3),
              "weight must have shape [K, C, 1, 1] or [K, C, 3, 3], got ", weight.sizes());
  const int64_t outputs = weight.size(0), channels = weight.size(1), kernel = weight.size(2);
  const Tensor dense = weight.to(dtype == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  Tensor packed = weight.new_empty({packed_bytes(dtype, kernel, channels, outputs)}, at::kByte);
  const auto run = kernel == 1 ? DISPATCH_CAPABILITY(dtype, pack_conv1x1) : DISPATCH_CAPABILITY(dtype, pack_conv3x3);
  run(dtype, dense.const_data_ptr(), channels, outputs, packed.data_ptr());
  return packed;
}

// Runs a stage whose norms all use their running statistics on ``x``, its input's rows. ``features``, where given, gets
// the rows of the block's output; ``out`` those of its exit.
void dense_stage_inference(const Tensor& x, int64_t height, int64_t width, int64_t bottleneck_channels,
                           int64_t growth_rate, const c10::List<Tensor>& affines, const c10::List<Tensor>& packed,
                           const std::optional<Tensor>& exit_affine, const std::optional<Tensor>& exit_packed,
                           at::IntArrayRef window, const std::optional<Tensor>& features,
                           const std::optional<Tensor>& out) {
  const Images images{check_images(x, "x", height, width), height, width};
  const int64_t channels = x.size(1);
  check_matrix(x, "x", images.rows(), channels, x);
  const size_t per_layer = bottleneck_channels > 0 ? 2 : 1, layers = packed.size() / per_layer;
  TORCH_CHECK(affines.size() == packed.size() && layers > 0 && layers * per_layer == packed.size(),
              "affines and packed must have one entry per convolution of each layer, got ", affines.size(), " and ",
              packed.size());
  TORCH_CHECK(channels > 0 && growth_rate > 0 && bottleneck_channels >= 0, "Expected channels, got ", channels,
              " of x, ", growth_rate, " of a layer and ", bottleneck_channels, " of a bottleneck");
  TORCH_CHECK(window.size() == 2, "Expected a window of two sizes, got ", window);
  check_window(height, width, window[0], window[1]);
  Stage stage{x.scalar_type(),
              static_cast<int64_t>(x.element_size()),
              channels,
              channels,
              growth_rate,
              bottleneck_channels,
              {},
              {window[0], window[1]},
              {},
              {}};
  for (size_t index = 0; index < packed.size(); stage.total += growth_rate) {
    int64_t read = stage.total;
    if (bottleneck_channels > 0) {
      stage.convolutions.push_back(make_convolution(affines[index], packed[index], 1, read, bottleneck_channels, x));
      read = bottleneck_channels;
      index++;
    }
    stage.convolutions.push_back(make_convolution(affines[index], packed[index], 3, read, growth_rate, x));
    index++;
  }
  TORCH_CHECK(features || out, "Expected features or out to be given");
  if (features) check_matrix(*features, "features", images.rows(), stage.total, x);
  Tensor conv_affine;  // lives until the stage has run
  if (out) {
    TORCH_CHECK(exit_affine, "Expected exit_affine with out");
    stage.exit_norm = make_norm(*exit_affine, stage.total, x);
    if (exit_packed) {
      conv_affine = *exit_affine;
      if (window[0] * window[1] > 1) {
        // What is pooled is not negative, so that a ReLU in front of the convolution changes nothing.
        conv_affine = x.new_zeros({4, stage.total}, accumulation_dtype(x));
        conv_affine.select(0, 2).fill_(1);
      }
      stage.exit_conv = make_convolution(conv_affine, *exit_packed, 1, stage.total, out->size(1), x);
    }
    check_matrix(*out, "out", stage.pooled(images).rows(), exit_packed ? out->size(1) : stage.total, x);
  }
  const auto rows_if_given = [](const std::optional<Tensor>& matrix) { return matrix ? rows_of(*matrix) : Rows{}; };
  run_stage(stage, images, rows_of(x), rows_if_given(features), rows_if_given(out));
}

}  // namespace densenet_efficient
