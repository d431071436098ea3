#include "cpu/pages.h"

#include <algorithm>
#include <iterator>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace densenet_efficient {
namespace {

size_t round_up(size_t bytes) { return (bytes + Pages::kMultiple - 1) / Pages::kMultiple * Pages::kMultiple; }

#if defined(__unix__) || defined(__APPLE__)

void unmap(char* data, size_t bytes) { munmap(data, bytes); }

// Pages that are handed out when they are first touched; null if refused.
char* map_fresh(size_t bytes) {
  void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return data == MAP_FAILED ? nullptr : static_cast<char*>(data);
}

#else

void unmap(char*, size_t) {}
char* map_fresh(size_t) { return nullptr; }

#endif

#if defined(__linux__)

constexpr bool kCanMove = true;

bool move(const Pages::Range& from, char* to) {
  return mremap(from.data, from.bytes, from.bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED;
}

#else

constexpr bool kCanMove = false;

bool move(const Pages::Range&, char*) { return false; }

#endif

}  // namespace

Pages::Buffer Pages::Buffer::cut(size_t bytes) {
  char* const middle = data() + bytes;
  const auto first =
      std::find_if(ranges.begin(), ranges.end(), [&](const Range& range) { return range.end() > middle; });
  Buffer behind{{first, ranges.end()}};
  ranges.erase(first, ranges.end());
  Range& cut = behind.ranges.front();
  if (cut.data < middle) {
    const size_t before = middle - cut.data;
    ranges.push_back({cut.data, before, cut.mapping});
    cut = {middle, cut.bytes - before, cut.mapping};
  }
  return behind;
}

void Pages::Buffer::append(const Buffer& behind) {
  auto next = behind.ranges.begin();
  if (next->mapping == ranges.back().mapping) ranges.back().bytes += next++->bytes;
  ranges.insert(ranges.end(), next, behind.ranges.end());
}

std::optional<Pages::Buffer> Pages::take(size_t bytes) {
  bytes = round_up(bytes);
  if (const auto found = find(bytes); found != kept_.end() && found->second.bytes() >= bytes) return take_kept(bytes);
  char* const data = map_fresh(bytes);
  if (data == nullptr) return std::nullopt;
  Buffer buffer;
  size_t filled = 0;
  bool moved = true;
  while (kCanMove && moved && filled < bytes && !kept_.empty()) {
    const Buffer part = take_kept(bytes - filled);
    for (const Range& range : part.ranges) {
      moved = moved && move(range, data + filled);
      if (moved) {
        buffer.ranges.push_back({data + filled, range.bytes, mappings_++});
        filled += range.bytes;
      } else {
        unmap(range.data, range.bytes);
      }
    }
  }
  if (!moved) {  // too many ranges; the addresses that are left may not be ours any more, and hold no memory
    let_go(buffer);
    return std::nullopt;
  }
  if (filled < bytes) buffer.ranges.push_back({data + filled, bytes - filled, mappings_++});
  return buffer;
}

Pages::Kept::iterator Pages::find(size_t bytes) {
  const auto is_better = [&](const Kept::value_type& one, const Kept::value_type& other) {
    const size_t size = one.second.bytes(), other_size = other.second.bytes();
    const bool suffices = size >= bytes, other_suffices = other_size >= bytes;
    return suffices == other_suffices ? (suffices ? size < other_size : size > other_size) : suffices;
  };
  return std::min_element(kept_.begin(), kept_.end(), is_better);
}

Pages::Buffer Pages::take_kept(size_t bytes) {
  const auto found = find(bytes);
  Buffer buffer = std::move(found->second);
  kept_.erase(found);
  kept_bytes_ -= buffer.bytes();
  if (buffer.bytes() > bytes) keep(buffer.cut(bytes));
  return buffer;
}

void Pages::keep(Buffer buffer) {
  kept_bytes_ += buffer.bytes();
  if (const auto behind = kept_.find(buffer.end()); behind != kept_.end()) {
    buffer.append(behind->second);
    kept_.erase(behind);
  }
  const auto next = kept_.upper_bound(buffer.data());
  if (next != kept_.begin() && std::prev(next)->second.end() == buffer.data()) {
    std::prev(next)->second.append(buffer);
  } else {
    kept_.emplace(buffer.data(), std::move(buffer));
  }
}

void Pages::let_go(size_t bytes) {
  bytes = round_up(bytes);
  while (bytes > 0 && !kept_.empty()) {
    const Buffer buffer = take_kept(bytes);
    bytes -= buffer.bytes();
    let_go(buffer);
  }
}

void Pages::let_go(const Buffer& buffer) {
  for (const Range& range : buffer.ranges) unmap(range.data, range.bytes);
}

}  // namespace densenet_efficient
