// A 3x3 convolution's weight, packed as the right operands of its products.
#pragma once

#include <ATen/Parallel.h>

#include "cpu/kernels/tile.h"
#include "cpu/kernels/winograd.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Channels of x that are taken at a time; ``padded`` is even where operands come in pairs.
struct ChannelChunk {
  int64_t first, channels, padded;
};

template <typename T>
class ChannelChunks {
 public:
  explicit ChannelChunks(int64_t channels) : channels_(channels) {}

  int64_t chunks() const { return ceil_div(channels_, kWidest); }
  ChannelChunk chunk(int64_t index) const {
    const int64_t first = index * kWidest, count = std::min(kWidest, channels_ - first);
    return {first, count, even(count)};
  }
  static int64_t even(int64_t count) { return kPairedRows<T> ? round_up(count, 2) : count; }

 private:
  static constexpr int64_t kWidest = 192;
  int64_t channels_;
};

// A weight [outputs, channels, 3, 3] as [outputs, 9, channels], which it is already in channels-last memory.
template <typename A>
class TapsFirst {
 public:
  TapsFirst(const A* weight, int64_t outputs, int64_t channels, bool channels_last)
      : channels_(channels), copy_(channels_last ? 0 : outputs * 9 * channels), data_(weight) {
    if (channels_last) return;
    for (int64_t output = 0; output < outputs; output++) {
      taps_first(weight + output * 9 * channels, channels, copy_.get() + output * 9 * channels, channels);
    }
    data_ = copy_.get();
  }

  // One tap of one output, [channels]; the next output is 9 * channels elements further.
  const A* at(int64_t output, int64_t tap) const { return data_ + (output * 9 + tap) * channels_; }

 private:
  int64_t channels_;
  Scratch<A> copy_;
  const A* data_;
};

// For the forward: per chunk and vertical tap, rows (horizontal tap, channel) of [outputs].
template <typename T>
class ForwardWeight : public ChannelChunks<T> {
 public:
  // Reads what ``pack`` has written.
  ForwardWeight(const T* packed, int64_t outputs, int64_t channels)
      : ChannelChunks<T>(channels), outputs_(outputs), packed_(packed) {}

  static int64_t packed_size(int64_t outputs, int64_t channels) {
    return 9 * (channels + ChannelChunks<T>(channels).chunks()) * outputs;
  }

  template <typename A>
  static void pack(const A* weight, int64_t outputs, int64_t channels, bool channels_last, T* packed) {
    const ForwardWeight places(packed, outputs, channels);
    const TapsFirst<A> taps(weight, outputs, channels, channels_last);
    const Scratch<A> transposed(9 * channels * outputs);  // [9, channels, outputs]
    for (int64_t tap = 0; tap < 9; tap++) {
      transpose(taps.at(0, tap), 9 * channels, outputs, channels, transposed.get() + tap * channels * outputs, outputs);
    }
    const Scratch<A> zeros(outputs);
    std::fill_n(zeros.get(), outputs, A(0));
    for (int64_t index = 0; index < places.chunks(); index++) {
      const ChannelChunk chunk = places.chunk(index);
      for (int64_t ky = 0; ky < 3; ky++) {
        pack_gathered(3 * chunk.padded, outputs, packed + places.offset(index, ky), [&](int64_t row) -> const A* {
          const int64_t kx = row / chunk.padded, channel = row % chunk.padded;
          if (channel >= chunk.channels) return zeros.get();
          return transposed.get() + ((ky * 3 + kx) * channels + chunk.first + channel) * outputs;
        });
      }
    }
  }

  const T* taps(int64_t index, int64_t ky) const { return packed_ + offset(index, ky); }

 private:
  int64_t offset(int64_t index, int64_t ky) const {
    const ChannelChunk chunk = this->chunk(index);
    return (9 * (chunk.first + index) + 3 * ky * chunk.padded) * outputs_;
  }

  int64_t outputs_;
  const T* packed_;
};

// For the gradient of the input: per chunk and vertical tap, rows (horizontal tap, output) of [channels of the chunk],
// the taps flipped.
template <typename T>
class BackwardWeight : public ChannelChunks<T> {
 public:
  template <typename A>
  BackwardWeight(const A* weight, int64_t outputs, int64_t channels, bool channels_last)
      : ChannelChunks<T>(channels), outputs_(this->even(outputs)), packed_(9 * outputs_ * channels) {
    const TapsFirst<A> weight_taps(weight, outputs, channels, channels_last);
    const Scratch<A> zeros(channels);
    std::fill_n(zeros.get(), channels, A(0));
    for (int64_t index = 0; index < this->chunks(); index++) {
      const ChannelChunk chunk = this->chunk(index);
      for (int64_t vertical = 0; vertical < 3; vertical++) {
        pack_gathered(3 * outputs_, chunk.channels, taps(index, vertical), [&](int64_t row) -> const A* {
          const int64_t horizontal = row / outputs_, output = row % outputs_;
          const int64_t tap = (2 - vertical) * 3 + 2 - horizontal;
          return output < outputs ? weight_taps.at(output, tap) + chunk.first : zeros.get();
        });
      }
    }
  }

  int64_t padded_outputs() const { return outputs_; }
  T* taps(int64_t index, int64_t vertical) const {
    const ChannelChunk chunk = this->chunk(index);
    return packed_.get() + (9 * chunk.first + 3 * vertical * chunk.channels) * outputs_;
  }

 private:
  int64_t outputs_;
  Scratch<T> packed_;
};

// A weight transformed for winograd.h: sixteen right operands, [channels, outputs] in the forward, [outputs, channels]
// (of flipped taps) for the gradient of the input.
class TransformedWeight {
 public:
  TransformedWeight(float* data, int64_t outputs, int64_t channels)
      : data_(data), outputs_(outputs), channels_(channels) {}

  static int64_t size(int64_t outputs, int64_t channels) { return kElements * distance(outputs, channels); }
  float* at(int64_t element) const { return data_ + element * distance(outputs_, channels_); }

  void transform_forward(const float* weight, bool channels_last) const {
    constexpr int64_t block = 16;
    const TapsFirst<float> taps(weight, outputs_, channels_, channels_last);
    at::parallel_for(0, ceil_div(channels_, block), 1, [&](int64_t begin, int64_t end) {
      const Scratch<float> rows(9 * block * outputs_);  // [9, block, outputs]
      for (int64_t first = begin * block; first < std::min(end * block, channels_); first += block) {
        const int64_t count = std::min(block, channels_ - first);
        for (int64_t tap = 0; tap < 9; tap++) {
          transpose(taps.at(0, tap) + first, 9 * channels_, outputs_, count, rows.get() + tap * block * outputs_,
                    outputs_);
        }
        for (int64_t c = 0; c < count; c++) {
          const auto row_of = [&](int64_t tap) { return rows.get() + (tap * block + c) * outputs_; };
          winograd::transform_taps(outputs_, row_of, data_ + (first + c) * outputs_, distance(outputs_, channels_));
        }
      }
    });
  }

  void transform_backward(const float* weight, bool channels_last) const {
    const TapsFirst<float> taps(weight, outputs_, channels_, channels_last);
    at::parallel_for(0, outputs_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t output = begin; output < end; output++) {
        const auto row_of = [&](int64_t tap) { return taps.at(output, 8 - tap); };
        winograd::transform_taps(channels_, row_of, data_ + output * channels_, distance(outputs_, channels_));
      }
    });
  }

 private:
  static int64_t distance(int64_t outputs, int64_t channels) { return outputs * channels + 16; }

  float* data_;
  int64_t outputs_, channels_;
};

}  // namespace densenet_efficient::CPU_CAPABILITY
