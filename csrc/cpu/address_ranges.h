// A set of addresses, as ranges that neither overlap nor touch.
#pragma once

#include <algorithm>
#include <cstddef>
#include <iterator>
#include <map>

namespace densenet_efficient {

struct AddressRange {
  char *begin, *end;

  size_t bytes() const { return end - begin; }
};

class AddressRanges {
 public:
  bool empty() const { return ends_.empty(); }
  AddressRange last() const { return {ends_.rbegin()->first, ends_.rbegin()->second}; }

  // The first range of at least ``bytes``; null where there is none.
  char* first_of(size_t bytes) const {
    const auto found = std::find_if(ends_.begin(), ends_.end(), [&](const auto& range) {
      return static_cast<size_t>(range.second - range.first) >= bytes;
    });
    return found == ends_.end() ? nullptr : found->first;
  }

  // None of its addresses may be in the set.
  void add(AddressRange range) {
    auto next = ends_.lower_bound(range.begin);
    if (next != ends_.begin() && std::prev(next)->second == range.begin) range.begin = std::prev(next)->first;
    if (next != ends_.end() && next->first == range.end) {
      range.end = next->second;
      ends_.erase(next);
    }
    ends_[range.begin] = range.end;
  }

  // Any part of the range may be missing.
  void remove(AddressRange range) {
    take_out(range, [](AddressRange) {});
  }

  // As ``remove``; calls ``each`` with the parts that were in the set.
  template <typename Each>
  void take_out(AddressRange range, Each each) {
    auto next = ends_.upper_bound(range.begin);
    if (next != ends_.begin() && std::prev(next)->second > range.begin) --next;
    while (next != ends_.end() && next->first < range.end) {
      const AddressRange found{next->first, next->second};
      next = ends_.erase(next);
      if (found.begin < range.begin) ends_[found.begin] = range.begin;
      if (found.end > range.end) ends_[range.end] = found.end;
      each(AddressRange{std::max(found.begin, range.begin), std::min(found.end, range.end)});
    }
  }

 private:
  std::map<char*, char*> ends_;  // by the ranges' begins
};

}  // namespace densenet_efficient
