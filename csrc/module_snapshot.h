// What modules were made of at one moment, to tell later whether all of it is still the same.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "read_ahead.h"

namespace densenet_efficient {

// Of every module of a few trees: its class, its attributes and what its dictionaries hold (parameters, buffers,
// submodules, hooks but those of state dicts), each by identity; of every tensor, where their values count, also its
// version, its address and a sample of its values, and otherwise its class alone. A change in place raises the version,
// but for those that PyTorch does not count: by fused optimizers, through ``.data`` or NumPy, by collectives, in
// another process that shares the memory. These show in the sample. A mutable attribute of another kind counts as
// unchanged for as long as it is the same object.
class ModuleSnapshot {
 public:
  enum class Kind : char { kOther, kTensor, kDictionary, kModules, kDifferent };

  ModuleSnapshot(const pybind11::list& modules, bool with_values);

  // Whether ``modules`` are now what those of the snapshot were.
  bool matches(const pybind11::list& modules) const;

  // For Python's garbage collector: the objects may lead back to what holds the snapshot.
  int visit_objects(visitproc visit, void* argument) const;
  void clear() {
    entries_.clear();
    values_.clear();
  }

 private:
  struct Entry {
    pybind11::object name, value;  // held, so that nothing new can come to their addresses
    Kind kind;
  };
  struct Value {
    const at::Tensor* tensor;  // of an entry's object
    int64_t version;
    const void* address;
    uint64_t sample;
  };

  bool objects_match(const pybind11::list& modules) const;
  bool values_match() const;

  bool with_values_;
  std::vector<Entry> entries_;
  std::vector<Value> values_;
  ReadAhead objects_, tensors_;  // what their comparisons read
};

void define_module_snapshot(pybind11::module_& module);

}  // namespace densenet_efficient
