// A 3x3 convolution's weight, packed as the right operands of its products.
#pragma once

#include "cpu/kernels/tile.h"

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

}  // namespace densenet_efficient::CPU_CAPABILITY
