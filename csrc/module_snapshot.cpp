#include "module_snapshot.h"

#include <torch/csrc/autograd/python_variable.h>

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

// What of ``object`` is compared.
PyObject* identity(PyObject* object, bool with_values) {
  return with_values || !is_tensor(object) ? object : reinterpret_cast<PyObject*>(Py_TYPE(object));
}

}  // namespace

ModuleSnapshot::ModuleSnapshot(const py::list& modules, bool with_values) : with_values_(with_values) {
  walk_all(modules, [this](PyObject* visited) {
    PyObject* object = identity(visited, with_values_);
    entries_.push_back({py::reinterpret_borrow<py::object>(object), is_tensor(object), 0, nullptr});
    if (is_tensor(object)) {
      const at::Tensor& tensor = THPVariable_Unpack(object);
      entries_.back().version = tensor._version();
      entries_.back().address = tensor.const_data_ptr();
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
    return tensor._version() == known.version && tensor.const_data_ptr() == known.address;
  };
  return walk_all(modules, is_same) && entry == entries_.end();
}

}  // namespace densenet_efficient
