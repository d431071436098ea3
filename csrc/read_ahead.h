// Memory that will be read here and there, asked for at once: fetched one after the other, objects and samples that lie
// apart cost the time of a memory access each.
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace densenet_efficient {

class ReadAhead {
 public:
  void add(const void* first, int64_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(first);
    for (uintptr_t line = address / kLine; line <= (address + bytes - 1) / kLine; line++)
      lines_.push_back(line * kLine);
  }

  // What PyDict_Next reads: the object and its entries.
  void add_dictionary(PyObject* object) {
    const auto* dictionary = reinterpret_cast<PyDictObject*>(object);
    add(dictionary, sizeof *dictionary);
    const int64_t used = dictionary->ma_used;
    if (used == 0) return;
    add(dictionary->ma_keys, kHeader + used * (kEntry + kIndices));
    if (dictionary->ma_values != nullptr) add(dictionary->ma_values, used * static_cast<int64_t>(sizeof(PyObject*)));
  }

  // Each line once.
  void finish() {
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
    lines_.shrink_to_fit();
  }

  // Asks for all of it; what is no longer there does no harm.
  void ask() const {
    for (const uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line));
  }

 private:
  static constexpr uintptr_t kLine = 64;
  // About those of a dictionary's keys in CPython; nothing but time depends on them.
  static constexpr int64_t kHeader = 40, kEntry = PY_VERSION_HEX >= 0x030B0000 ? 16 : 24, kIndices = 3;

  std::vector<uintptr_t> lines_;
};

}  // namespace densenet_efficient
