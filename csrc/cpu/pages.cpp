#include "cpu/pages.h"

#include <algorithm>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace densenet_efficient {
namespace {

size_t round_up(size_t bytes) { return (bytes + Pages::kMultiple - 1) / Pages::kMultiple * Pages::kMultiple; }

#if defined(__unix__) || defined(__APPLE__)

// Of twice the machine's memory, without any of it; none where addresses are limited, for others need them.
AddressRange reserve_addresses() {
  rlimit limit;
  if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur != RLIM_INFINITY) return {};
  const size_t bytes = round_up(2 * static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE));
  void* const data = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return {};
  return {static_cast<char*>(data), static_cast<char*>(data) + bytes};
}

// Pages that are handed out when they are first touched.
bool make_usable(AddressRange range) { return mprotect(range.begin, range.bytes(), PROT_READ | PROT_WRITE) == 0; }

// The addresses stay; their pages, if they are touched again, are fresh ones.
void give_back(AddressRange range) {
#if defined(__APPLE__)
  madvise(range.begin, range.bytes(), MADV_FREE);
#else
  madvise(range.begin, range.bytes(), MADV_DONTNEED);
#endif
}

#else

AddressRange reserve_addresses() { return {}; }
bool make_usable(AddressRange) { return false; }
void give_back(AddressRange) {}

#endif

#if defined(__linux__)

// Of Linux 5.7 and 4.17; older ones refuse the first, and older headers name neither.
constexpr int kKeepAddresses = 4;      // MREMAP_DONTUNMAP
constexpr int kIfUnmapped = 0x100000;  // MAP_FIXED_NOREPLACE

// Moves pages between addresses, all of which stay usable.
bool move(AddressRange from, char* to) {
  const size_t bytes = from.bytes();
  if (mremap(from.begin, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | kKeepAddresses, to) != MAP_FAILED) return true;
  // The system refuses before it has made room, or else has lost the addresses.
  mmap(to, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | kIfUnmapped, -1, 0);
  return false;
}

#else

bool move(AddressRange, char*) { return false; }

#endif

}  // namespace

Pages::Pages() : reserved_(reserve_addresses()), top_(reserved_.begin) {}

AddressRange Pages::take(size_t bytes) {
  bytes = round_up(bytes);
  char* const data = place(bytes);
  if (data == nullptr) return {};
  const AddressRange buffer{data, data + bytes};
  free_.remove(buffer);
  in_use_ += bytes;
  most_in_use_ = std::max(most_in_use_, in_use_);
  std::vector<AddressRange> gaps;
  char* filled = buffer.begin;
  kept_.take_out(buffer, [&](AddressRange part) {
    if (filled < part.begin) gaps.push_back({filled, part.begin});
    filled = part.end;
  });
  if (filled < buffer.end) gaps.push_back({filled, buffer.end});
  for (const AddressRange& gap : gaps) fill(gap);
  return buffer;
}

// The first free addresses, else those behind all others.
char* Pages::place(size_t bytes) {
  if (char* const data = free_.first_of(bytes)) return data;
  char* const data = !free_.empty() && free_.last().end == top_ ? free_.last().begin : top_;
  if (static_cast<size_t>(reserved_.end - data) < bytes) return nullptr;
  const AddressRange more{top_, data + bytes};
  if (!make_usable(more)) return nullptr;
  free_.add(more);
  top_ = more.end;
  return data;
}

// Pages for addresses that have none.
void Pages::fill(AddressRange gap) {
  while (gap.begin < gap.end) {
    const bool may_hold_more = held_ + gap.bytes() <= most_in_use_ + kSpare;
    if (may_hold_more || kept_.empty()) {
      held_ += gap.bytes();
      return;
    }
    const AddressRange part = take_kept(gap.bytes());
    char* const end = gap.begin + part.bytes();
    if (part.bytes() >= kWorthMoving && move(part, gap.begin)) {
      seams_.insert({gap.begin, end});
    } else {
      give_back(part);
    }
    gap.begin = end;
  }
}

// At most ``bytes``, which one call moves; from the end, where the next step needs them last.
AddressRange Pages::take_kept(size_t bytes) {
  AddressRange part = kept_.last();
  part.begin = std::max(part.begin, part.end - std::min(bytes, part.bytes()));
  const auto seam = seams_.lower_bound(part.end);
  if (seam != seams_.begin()) part.begin = std::max(part.begin, *std::prev(seam));
  kept_.remove(part);
  return part;
}

void Pages::keep(AddressRange buffer) {
  in_use_ -= buffer.bytes();
  free_.add(buffer);
  kept_.add(buffer);
}

void Pages::let_all_go() {
  while (!kept_.empty()) {
    const AddressRange range = kept_.last();
    kept_.remove(range);
    give_back(range);
  }
  held_ = most_in_use_ = in_use_;
}

}  // namespace densenet_efficient
