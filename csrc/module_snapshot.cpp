#include "module_snapshot.h"

#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>

namespace densenet_efficient {
namespace {

namespace py = pybind11;

// By its class: isinstance would ask the metaclass of every object, in Python.
bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Calls visit(object) for all that a module is made of, in order, until one is false; submodules come where they stand.
template <typename Visit>
bool walk(PyObject* module, const Visit& visit) {
  if (!visit(reinterpret_cast<PyObject*>(Py_TYPE(module)))) return false;
  if (module == Py_None) return true;
  const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!attributes) throw py::error_already_set();
  PyObject *name, *value, *key, *item;
  for (Py_ssize_t outer = 0; PyDict_Next(attributes.ptr(), &outer, &name, &value);) {
    if (!visit(name) || !visit(value)) return false;
    if (!PyDict_Check(value)) continue;
    const bool holds_modules = PyUnicode_CompareWithASCIIString(name, "_modules") == 0;
    for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &key, &item);) {
      if (!visit(key) || !visit(item) || (holds_modules && !walk(item, visit))) return false;
    }
    if (!visit(Py_None)) return false;  // where a dictionary ends
  }
  return visit(Py_None);
}

template <typename Visit>
bool walk_all(const py::list& modules, const Visit& visit) {
  for (const py::handle module : modules) {
    if (!walk(module.ptr(), visit)) return false;
  }
  return true;
}

constexpr int64_t kSamples = 8;  // of a tensor: more would take longer than a hundredth of an inference of one image

// A hash of elements spread evenly over a tensor; 0 where its memory cannot be read from here.
uint64_t sample_of(const at::Tensor& tensor) {
  if (!tensor.is_cpu() || !tensor.has_storage() || tensor.numel() == 0) return 0;
  const auto* first = static_cast<const char*>(tensor.const_data_ptr());
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  int64_t span = 0;  // in elements, from the first in memory to the last
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) span += (tensor.size(axis) - 1) * tensor.stride(axis);
  const int64_t end = (tensor.storage_offset() + span + 1) * bytes;
  const bool is_there = first != nullptr && end <= static_cast<int64_t>(tensor.storage().nbytes());
  if (!is_there) return 0;  // FSDP frees it between uses
  uint64_t hash = 0;
  for (int64_t index = 0; index < kSamples; ++index) {
    uint64_t bits = 0;
    std::memcpy(&bits, first + span * index / (kSamples - 1) * bytes, std::min<size_t>(bytes, sizeof bits));
    hash = (hash ^ bits) * 0x9E3779B97F4A7C15 + (hash >> 29);
  }
  return hash;
}

// Those made in inference mode have no version, and sparse ones no address.
int64_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

const void* address_of(const at::Tensor& tensor) { return tensor.has_storage() ? tensor.const_data_ptr() : nullptr; }

// What of ``object`` is compared.
PyObject* identity(PyObject* object, bool with_values) {
  return with_values || !is_tensor(object) ? object : reinterpret_cast<PyObject*>(Py_TYPE(object));
}

// The snapshot that ``self`` holds; null where the collector comes before it is made.
ModuleSnapshot* made(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<ModuleSnapshot>() : nullptr;
}

}  // namespace

ModuleSnapshot::ModuleSnapshot(const py::list& modules, bool with_values) : with_values_(with_values) {
  walk_all(modules, [this](PyObject* visited) {
    PyObject* object = identity(visited, with_values_);
    entries_.push_back({py::reinterpret_borrow<py::object>(object), is_tensor(object), 0, nullptr, 0});
    if (is_tensor(object)) {
      const at::Tensor& tensor = THPVariable_Unpack(object);
      entries_.back().version = version_of(tensor);
      entries_.back().address = address_of(tensor);
      entries_.back().sample = sample_of(tensor);
    }
    return true;
  });
}

bool ModuleSnapshot::matches(const py::list& modules) const {
  auto entry = entries_.begin();
  const auto is_same = [&](PyObject* visited) {
    PyObject* object = identity(visited, with_values_);
    if (entry == entries_.end() || entry->object.ptr() != object) return false;
    const Entry& known = *entry++;
    if (!known.has_value) return true;
    const at::Tensor& tensor = THPVariable_Unpack(object);
    return version_of(tensor) == known.version && address_of(tensor) == known.address &&
           sample_of(tensor) == known.sample;
  };
  return walk_all(modules, is_same) && entry == entries_.end();
}

int ModuleSnapshot::visit_objects(visitproc visit, void* argument) const {
  for (const Entry& entry : entries_) {
    if (const int result = visit(entry.object.ptr(), argument); result != 0) return result;
  }
  return 0;
}

void define_module_snapshot(py::module_& module) {
  const auto collected = py::custom_type_setup([](PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {  // as Py_VISIT has it
      Py_VISIT(Py_TYPE(self));
      const ModuleSnapshot* snapshot = made(self);
      return snapshot == nullptr ? 0 : snapshot->visit_objects(visit, arg);
    };
    type.tp_clear = [](PyObject* self) {
      if (ModuleSnapshot* snapshot = made(self)) snapshot->clear();
      return 0;
    };
  });
  py::class_<ModuleSnapshot>(module, "ModuleSnapshot", collected)
      .def(py::init<const py::list&, bool>(), py::arg("modules"), py::kw_only(), py::arg("with_values"))
      .def("matches", &ModuleSnapshot::matches);
}

}  // namespace densenet_efficient
