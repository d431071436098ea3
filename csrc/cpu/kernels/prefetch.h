// Memory that will be needed soon, asked for while something else is computed. For one image alone the weights are most
// of it: they come from beyond the second-level cache each time, and a core that waits for them has no use for another.
#pragma once

#include <cstdint>

#include "cpu/vector.h"

namespace densenet_efficient::CPU_CAPABILITY {

// Blocks of matrices whose cache lines are to be asked for, two neighbours at a time, in the order of their addition.
class Prefetch {
 public:
  // Adds a block [rows, columns]; nothing where it is null or empty, or where too many blocks wait.
  template <typename T>
  void add(const T* block, int64_t stride, int64_t rows, int64_t columns) {
    if (block == nullptr || rows <= 0 || waiting_ == kMost) return;
    const int64_t size = sizeof(T);
    blocks_[waiting_++] = {reinterpret_cast<const char*>(block), stride * size, columns * size, rows};
  }

  // Adds what lies between two offsets.
  void add_bytes(const void* data, int64_t begin, int64_t end) {
    if (data != nullptr && begin < end) add(static_cast<const char*>(data) + begin, 0, 1, end - begin);
  }

  ALWAYS_INLINE void next() {
    if (waiting_ > 0) ask();
  }

 private:
  struct Block {
    const char* row;
    int64_t stride, bytes, rows;
  };
  static constexpr int kMost = 4;

  ALWAYS_INLINE void ask() {
    Block& block = blocks_[0];
    __builtin_prefetch(block.row + byte_, 0, 2);
    __builtin_prefetch(block.row + byte_ + 64, 0, 2);
    byte_ += 128;
    if (byte_ < block.bytes) return;
    byte_ = 0;
    block.row += block.stride;
    if (--block.rows > 0) return;
    for (int i = 1; i < waiting_; i++) blocks_[i - 1] = blocks_[i];
    waiting_--;
  }

  Block blocks_[kMost];
  int waiting_ = 0;
  int64_t byte_ = 0;
};

}  // namespace densenet_efficient::CPU_CAPABILITY
