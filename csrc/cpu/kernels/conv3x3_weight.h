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

  static constexpr int64_t kWidest = 192;

 private:
  int64_t channels_;
};

// A weight [outputs, channels, 3, 3] as [outputs, 9, channels], which it is already in channels-last memory: a part of
// it at a time, so that threads copy side by side.
template <typename A>
class TapsFirst {
 public:
  TapsFirst(const A* weight, int64_t channels, bool channels_last, int64_t most_outputs, int64_t most_channels)
      : weight_(weight),
        channels_(channels),
        tap_stride_(channels_last ? channels : most_channels),
        copy_(channels_last ? 0 : most_outputs * 9 * most_channels),
        is_copied_(!channels_last) {}

  // Some outputs, and some channels of each.
  void take(int64_t output, int64_t outputs, int64_t channel, int64_t channels) {
    if (!is_copied_) {
      data_ = weight_ + output * stride() + channel;
      return;
    }
    for (int64_t index = 0; index < outputs; index++) {
      const A* from = weight_ + ((output + index) * channels_ + channel) * 9;
      taps_first(from, channels, channels_ - channel, copy_.get() + index * stride(), tap_stride_);
    }
    data_ = copy_.get();
  }

  // One tap of one of the outputs taken, [channels]; the next output is ``stride`` elements further.
  const A* at(int64_t output, int64_t tap) const { return data_ + output * stride() + tap * tap_stride_; }
  int64_t stride() const { return 9 * tap_stride_; }

 private:
  const A* weight_;
  int64_t channels_, tap_stride_;
  Scratch<A> copy_;
  bool is_copied_;
  const A* data_ = nullptr;
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
    constexpr int64_t block = 32;  // channels, in whole pairs; a chunk has whole blocks
    at::parallel_for(0, ceil_div(channels, block), 1, [&](int64_t begin, int64_t end) {
      TapsFirst<A> taps(weight, channels, channels_last, outputs, block);
      const Scratch<A> rows((block + 1) * outputs);  // of one tap, with one of zeros behind an odd number
      for (int64_t first = begin * block; first < std::min(end * block, channels); first += block) {
        const int64_t count = std::min(block, channels - first), index = first / ChannelChunks<T>::kWidest;
        const ChannelChunk chunk = places.chunk(index);
        taps.take(0, outputs, first, count);
        std::fill_n(rows.get() + count * outputs, outputs, A(0));
        for (int64_t tap = 0; tap < 9; tap++) {
          transpose(taps.at(0, tap), taps.stride(), outputs, count, rows.get(), outputs);
          T* to = packed + places.offset(index, tap / 3) + (tap % 3 * chunk.padded + first - chunk.first) * outputs;
          pack_gathered(places.even(count), outputs, to, [&](int64_t row) { return rows.get() + row * outputs; });
        }
      }
    });
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
    const Scratch<A> zeros(channels);
    std::fill_n(zeros.get(), channels, A(0));
    constexpr int64_t block = 4;  // outputs, in whole pairs
    at::parallel_for(0, ceil_div(outputs_, block), 1, [&](int64_t begin, int64_t end) {
      TapsFirst<A> weight_taps(weight, channels, channels_last, block, channels);
      for (int64_t first = begin * block; first < std::min(end * block, outputs_); first += block) {
        const int64_t count = std::min(block, outputs_ - first), given = std::min(block, outputs - first);
        weight_taps.take(first, given, 0, channels);
        for (int64_t index = 0; index < this->chunks(); index++) {
          const ChannelChunk chunk = this->chunk(index);
          for (int64_t tap = 0; tap < 9; tap++) {
            T* to = taps(index, 2 - tap / 3) + ((2 - tap % 3) * outputs_ + first) * chunk.channels;
            pack_gathered(count, chunk.channels, to, [&](int64_t row) -> const A* {
              return row < given ? weight_taps.at(row, tap) + chunk.first : zeros.get();
            });
          }
        }
      }
    });
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
template <typename T>
class TransformedWeight {
 public:
  TransformedWeight(T* data, int64_t outputs, int64_t channels) : data_(data), outputs_(outputs), channels_(channels) {}

  static int64_t size(int64_t outputs, int64_t channels) { return kElements * distance(outputs, channels); }
  T* at(int64_t element) const { return data_ + element * distance(outputs_, channels_); }

  void transform_forward(const float* weight, bool channels_last) const {
    constexpr int64_t block = 16;  // channels, in whole pairs
    at::parallel_for(0, ceil_div(channels_, block), 1, [&](int64_t begin, int64_t end) {
      TapsFirst<float> taps(weight, channels_, channels_last, outputs_, block);
      const int64_t rows = block * outputs_;
      const Scratch<float> untransformed(9 * rows);  // [9, block, outputs]
      const Scratch<float> transformed(kPairedRows<T> ? kElements * rows : 0);
      for (int64_t first = begin * block; first < std::min(end * block, channels_); first += block) {
        const int64_t count = std::min(block, channels_ - first);
        taps.take(0, outputs_, first, count);
        for (int64_t tap = 0; tap < 9; tap++) {
          transpose(taps.at(0, tap), taps.stride(), outputs_, count, untransformed.get() + tap * rows, outputs_);
        }
        const auto row_of = [&](int64_t tap) { return untransformed.get() + tap * rows; };
        if constexpr (kPairedRows<T>) {
          winograd::transform_taps(count * outputs_, row_of, transformed.get(), rows);
          for (int64_t element = 0; element < kElements; element++) {
            pack_gathered(count, outputs_, at(element) + first * outputs_,
                          [&](int64_t row) { return transformed.get() + element * rows + row * outputs_; });
          }
        } else {
          winograd::transform_taps(count * outputs_, row_of, data_ + first * outputs_, distance(outputs_, channels_));
        }
      }
    });
  }

  void transform_backward(const float* weight, bool channels_last) const {
    constexpr int64_t block = kPairedRows<T> ? 2 : 1;  // outputs
    at::parallel_for(0, ceil_div(outputs_, block), 1, [&](int64_t begin, int64_t end) {
      TapsFirst<float> taps(weight, channels_, channels_last, block, channels_);
      const Scratch<float> pair(kPairedRows<T> ? kElements * block * channels_ : 0);  // [16, 2, channels]
      for (int64_t first = begin * block; first < std::min(end * block, outputs_); first += block) {
        const int64_t count = std::min(block, outputs_ - first);
        taps.take(first, count, 0, channels_);
        const auto transform = [&](int64_t output, float* to, int64_t to_distance) {
          const auto row_of = [&](int64_t tap) { return taps.at(output, 8 - tap); };
          winograd::transform_taps(channels_, row_of, to, to_distance);
        };
        if constexpr (kPairedRows<T>) {
          for (int64_t output = 0; output < count; output++) {
            transform(output, pair.get() + output * channels_, block * channels_);
          }
          for (int64_t element = 0; element < kElements; element++) {
            pack_gathered(count, channels_, at(element) + first * channels_,
                          [&](int64_t row) { return pair.get() + (element * block + row) * channels_; });
          }
        } else {
          transform(0, data_ + first * channels_, distance(outputs_, channels_));
        }
      }
    });
  }

 private:
  static int64_t distance(int64_t outputs, int64_t channels) {
    return ChannelChunks<T>::even(outputs) * ChannelChunks<T>::even(channels) + 16;
  }

  T* data_;
  int64_t outputs_, channels_;
};

}  // namespace densenet_efficient::CPU_CAPABILITY
