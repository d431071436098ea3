// Large buffers made of the pages of freed ones, whatever their sizes.
//
// A fresh page costs about as much time as ten passes over it. A smaller buffer is a part of one that is kept; a larger
// one is put together, where the system moves pages between addresses (mremap of Linux). So memory is never kept in a
// size that nobody asks for.
#pragma once

#include <cstddef>
#include <map>
#include <optional>
#include <vector>

namespace densenet_efficient {

class Pages {
 public:
  // Buffers are whole multiples: a multiple of every system's page, and large enough that no buffer has many ranges.
  static constexpr size_t kMultiple = 1 << 16;

  // Pages that the system moves by one call.
  struct Range {
    char* data;
    size_t bytes;
    size_t mapping;  // two ranges of one may become one range again

    char* end() const { return data + bytes; }
  };

  // Adjacent ranges.
  struct Buffer {
    std::vector<Range> ranges;

    char* data() const { return ranges.front().data; }
    char* end() const { return ranges.back().end(); }
    size_t bytes() const { return end() - data(); }

    // Keeps the first ``bytes`` and returns what lies behind them.
    Buffer cut(size_t bytes);

    // Adds what lies behind.
    void append(const Buffer& behind);
  };

  // Of at least ``bytes``, with whatever its pages held before; none where the system refuses.
  std::optional<Buffer> take(size_t bytes);

  void keep(Buffer buffer);

  // Gives at least ``bytes`` of what is kept back to the system.
  void let_go(size_t bytes);

  static void let_go(const Buffer& buffer);

  size_t kept_bytes() const { return kept_bytes_; }

 private:
  using Kept = std::map<char*, Buffer>;  // by address, none adjacent to another

  // The smallest buffer that is large enough, else the largest.
  Kept::iterator find(size_t bytes);

  // That buffer; what it has beyond ``bytes`` stays.
  Buffer take_kept(size_t bytes);

  Kept kept_;
  size_t kept_bytes_ = 0, mappings_ = 0;
};

}  // namespace densenet_efficient
