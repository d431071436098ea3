#include "module_snapshot.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace densenet_efficient {
namespace {

namespace py = pybind11;
using Kind = ModuleSnapshot::Kind;

// By its class: isinstance would ask the metaclass of every object, in Python.
bool is_tensor(PyObject* object) {
  return PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass));
}

// Calls visit(name, value) for each attribute of a module, and for what its dictionaries hold, in order; submodules
// come where they stand, each behind its class, and a null name where a dictionary ends; one that holds itself, as a
// layer that knows its block, not once more. The kind that visit answers says how to go on: where it compares, it knows
// from the snapshot, and reads nothing of an object that is the same.
template <typename Visit>
bool walk(PyObject* module, const Visit& visit, std::vector<PyObject*>& around) {
  if (visit(nullptr, reinterpret_cast<PyObject*>(Py_TYPE(module))) == Kind::kDifferent) return false;
  if (module == Py_None || std::find(around.begin(), around.end(), module) != around.end()) return true;
  around.push_back(module);
  const auto attributes = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
  if (!attributes) throw py::error_already_set();
  if (visit(nullptr, attributes.ptr()) == Kind::kDifferent) return false;
  PyObject *name, *value, *key, *item;
  for (Py_ssize_t outer = 0; PyDict_Next(attributes.ptr(), &outer, &name, &value);) {
    const Kind kind = visit(name, value);
    if (kind == Kind::kDifferent) return false;
    if (kind != Kind::kDictionary && kind != Kind::kModules) continue;
    for (Py_ssize_t inner = 0; PyDict_Next(value, &inner, &key, &item);) {
      if (visit(key, item) == Kind::kDifferent || (kind == Kind::kModules && !walk(item, visit, around))) return false;
    }
    if (visit(nullptr, nullptr) == Kind::kDifferent) return false;
  }
  around.pop_back();
  return visit(nullptr, nullptr) != Kind::kDifferent;
}

template <typename Visit>
bool walk_all(const py::list& modules, const Visit& visit) {
  for (const py::handle module : modules) {
    std::vector<PyObject*> around;
    if (!walk(module.ptr(), visit, around)) return false;
  }
  return true;
}

// What concerns files alone.
bool is_of_state_dicts(PyObject* name) {
  for (const char* other :
       {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}) {
    if (PyUnicode_CompareWithASCIIString(name, other) == 0) return true;
  }
  return false;
}

// Dictionaries within dictionaries are looked at as little as other objects.
Kind kind_of(PyObject* name, PyObject* value) {
  if (value == nullptr) return Kind::kOther;
  if (is_tensor(value)) return Kind::kTensor;
  if (name == nullptr || !PyUnicode_Check(name) || !PyDict_Check(value) || is_of_state_dicts(name)) return Kind::kOther;
  return PyUnicode_CompareWithASCIIString(name, "_modules") == 0 ? Kind::kModules : Kind::kDictionary;
}

constexpr int64_t kSamples = 8;  // of a tensor: more would take longer than a hundredth of an inference of one image

// Where elements spread evenly over a tensor lie in memory: the first, and how far the last is from it.
struct Place {
  const char* first;  // null where they cannot be read from here
  int64_t span;       // in elements

  int64_t offset(int64_t index) const { return span * index / (kSamples - 1); }
};

Place place_of(const at::Tensor& tensor) {
  if (!tensor.is_cpu() || !tensor.has_storage() || tensor.numel() == 0) return {};
  int64_t span = 0;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) span += (tensor.size(axis) - 1) * tensor.stride(axis);
  const int64_t end = (tensor.storage_offset() + span + 1) * static_cast<int64_t>(tensor.element_size());
  if (end > static_cast<int64_t>(tensor.storage().nbytes())) return {};  // FSDP frees it between uses
  return {static_cast<const char*>(tensor.const_data_ptr()), span};
}

template <typename Element>
uint64_t hash_of(const Place& place) {
  uint64_t hash = 0;
  for (int64_t index = 0; index < kSamples; ++index) {
    Element bits;
    std::memcpy(&bits, place.first + place.offset(index) * sizeof bits, sizeof bits);
    hash = (hash ^ bits) * 0x9E3779B97F4A7C15 + (hash >> 29);
  }
  return hash;
}

// Of a few elements, 0 where there are none.
uint64_t sample_of(const at::Tensor& tensor) {
  const Place place = place_of(tensor);
  if (place.first == nullptr) return 0;
  switch (tensor.element_size()) {
    case 1:
      return hash_of<uint8_t>(place);
    case 2:
      return hash_of<uint16_t>(place);
    case 4:
      return hash_of<uint32_t>(place);
    default:
      return hash_of<uint64_t>(place);  // no parameter has elements of more bytes
  }
}

// Those made in inference mode have no version, and sparse ones no address.
int64_t version_of(const at::Tensor& tensor) { return tensor.is_inference() ? 0 : tensor._version(); }

const void* address_of(const at::Tensor& tensor) { return tensor.has_storage() ? tensor.const_data_ptr() : nullptr; }

// Whether what is asked of it may run Python.
bool is_of_python(const at::Tensor& tensor) { return tensor.unsafeGetTensorImpl()->is_python_dispatch(); }

// Fewer are compared before another thread has begun.
constexpr size_t kValuesOfAThread = 32;

// What a comparison reads of a tensor.
void add_tensor(ReadAhead& reads, const at::Tensor& tensor) {
  reads.add(&tensor, sizeof tensor);
  reads.add(tensor.unsafeGetTensorImpl(), sizeof(at::TensorImpl));
  if (tensor.has_storage()) reads.add(tensor.storage().unsafeGetStorageImpl(), sizeof(c10::StorageImpl));
  const Place place = place_of(tensor);
  for (int64_t index = 0; place.first != nullptr && index < kSamples; ++index) {
    reads.add(place.first + place.offset(index) * tensor.element_size(), 1);
  }
}

// The snapshot that ``self`` holds; null where the collector comes before it is made.
ModuleSnapshot* made(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<ModuleSnapshot>() : nullptr;
}

}  // namespace

ModuleSnapshot::ModuleSnapshot(const py::list& modules, bool with_values) : with_values_(with_values) {
  walk_all(modules, [this](PyObject* name, PyObject* value) {
    const Kind kind = kind_of(name, value);
    PyObject* known = kind == Kind::kTensor && !with_values_ ? reinterpret_cast<PyObject*>(Py_TYPE(value)) : value;
    entries_.push_back({py::reinterpret_borrow<py::object>(name), py::reinterpret_borrow<py::object>(known), kind});
    if (kind == Kind::kTensor && with_values_) {
      const at::Tensor& tensor = THPVariable_Unpack(value);
      values_.push_back({&tensor, version_of(tensor), address_of(tensor), sample_of(tensor)});
      add_tensor(tensors_, tensor);
    } else if (kind == Kind::kTensor) {
      objects_.add(value, sizeof *value);
    } else if (value != nullptr && PyDict_Check(value)) {
      objects_.add_dictionary(value);
    }
    return kind;
  });
  objects_.finish();
  tensors_.finish();
}

bool ModuleSnapshot::objects_match(const py::list& modules) const {
  objects_.ask();
  auto entry = entries_.begin();
  const auto compare = [&](PyObject* name, PyObject* value) {
    if (entry == entries_.end() || entry->name.ptr() != name) return Kind::kDifferent;
    const Entry& known = *entry++;
    const bool by_class = known.kind == Kind::kTensor && !with_values_;
    PyObject* object = by_class && value != nullptr ? reinterpret_cast<PyObject*>(Py_TYPE(value)) : value;
    return known.value.ptr() == object ? known.kind : Kind::kDifferent;
  };
  return walk_all(modules, compare) && entry == entries_.end();
}

bool ModuleSnapshot::values_match() const {
  tensors_.ask();
  return std::all_of(values_.begin(), values_.end(), [](const Value& before) {
    const at::Tensor& tensor = *before.tensor;
    return !is_of_python(tensor) && version_of(tensor) == before.version && address_of(tensor) == before.address &&
           sample_of(tensor) == before.sample;
  });
}

bool ModuleSnapshot::matches(const py::list& modules) const {
  if (values_.size() < kValuesOfAThread) return objects_match(modules) && values_match();
  // The calling thread, which holds the interpreter's lock, begins with the first.
  bool same_objects = true, same_values = true;
  at::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
    if (begin == 0) same_objects = objects_match(modules);
    if (end == 2) same_values = values_match();
  });
  return same_objects && same_values;
}

int ModuleSnapshot::visit_objects(visitproc visit, void* argument) const {
  for (const Entry& entry : entries_) {
    for (PyObject* object : {entry.name.ptr(), entry.value.ptr()}) {
      const int result = object == nullptr ? 0 : visit(object, argument);
      if (result != 0) return result;
    }
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
