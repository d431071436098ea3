"""The native snapshot of modules: of few tensors, and of so many that a second thread compares their values."""

import pytest
import torch
from cases import needs_native
from torch import nn

pytestmark = needs_native


@pytest.fixture(params=[1, 2, 3], ids="{} threads".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[2, 40], ids="{} layers".format)
def layers(request, threads):
    return nn.Sequential(*(nn.Linear(3, 4) for _ in range(request.param)))


def snapshot_of(*modules, with_values=True):
    from densenet_efficient._C import ModuleSnapshot

    return ModuleSnapshot([*modules], with_values=with_values)


def write_in_place(layer):
    with torch.no_grad():
        layer.bias += 1


def write_behind_the_version(layer):
    layer.bias.data[0] += 1


def write_through_numpy(layer):
    layer.weight.detach().numpy()[-1, -1] += 1


def move_the_data(layer):
    layer.weight.data = layer.weight.data.clone()


def swap_the_tensor(layer):
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach().clone()))


def free_the_memory(layer):
    layer.weight.untyped_storage().resize_(0)


VALUES = [
    write_in_place, write_behind_the_version, write_through_numpy, move_the_data, swap_the_tensor, free_the_memory,
]  # fmt: skip


def replace_the_parameter(layer):
    layer.bias = nn.Parameter(layer.bias.detach().clone())


def remove_the_parameter(layer):
    layer.bias = None


def add_an_attribute(layer):
    layer.remark = "new"


def hook(layer):
    layer.register_forward_hook(lambda *args: None)


def change_the_class(layer):
    layer.__class__ = type("Other", (nn.Linear,), {})


OBJECTS = [replace_the_parameter, remove_the_parameter, add_an_attribute, hook, change_the_class]


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("change", VALUES + OBJECTS, ids=lambda change: change.__name__)
def test_one_change(layers, change, index):
    snapshot = snapshot_of(layers)
    assert snapshot.matches([layers])
    change(layers[index])
    assert not snapshot.matches([layers])


@pytest.mark.parametrize("change", [write_in_place, write_behind_the_version], ids=lambda change: change.__name__)
def test_values_that_do_not_count(layers, change):
    snapshot = snapshot_of(layers, with_values=False)
    change(layers[-1])
    assert snapshot.matches([layers])
    layers[-1].weight = None
    assert not snapshot.matches([layers])


class Wrapped(torch.Tensor):
    """Its size is Python's to tell, and so a thread without the interpreter's lock must not ask for it."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, dispatch_sizes_strides_policy="sizes"
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = lambda value: value.inner if isinstance(value, cls) else value  # noqa: E731
        return function(*map(unwrap, args), **(kwargs or {}))


def test_a_tensor_becomes_one_of_python(layers):
    snapshot = snapshot_of(layers)
    weight, wrapped = layers[-1].weight, Wrapped(torch.zeros(4, 3))
    torch._C._autograd._unsafe_set_version_counter((wrapped,), (weight._version,))
    torch.utils.swap_tensors(weight, wrapped)
    assert not snapshot.matches([layers])


@pytest.mark.parametrize("with_values", [True, False])
def test_other_modules_than_those_of_the_snapshot(layers, with_values):
    """Fewer, more, others or in another order."""
    first, second = layers[0], layers[1]
    snapshot = snapshot_of(first, second, with_values=with_values)
    assert snapshot.matches([first, second])
    for others in ([], [first], [first, second, second], [first, second, None], [second, first], [first, None]):
        assert not snapshot.matches(others)
    assert not snapshot_of(first, with_values=with_values).matches([first, second])


def test_another_parameter_of_the_same_class_where_values_do_not_count(layers):
    snapshot = snapshot_of(layers, with_values=False)
    layers[-1].weight = nn.Parameter(torch.zeros(2, 5))
    assert snapshot.matches([layers])


def test_another_name_of_the_same_attribute(layers):
    layers[-1].remark = "equal"
    snapshot = snapshot_of(layers)
    layers[-1].__dict__["comment"] = layers[-1].__dict__.pop("remark")
    assert not snapshot.matches([layers])


def test_an_attribute_that_moves_into_the_dictionary_before_it(layers):
    """It comes in the same order, but for where the dictionary ends."""
    layer = layers[-1]
    layer.table, layer.remark = {}, "equal"
    snapshot = snapshot_of(layers)
    assert snapshot.matches([layers])
    layer.table["remark"] = layer.__dict__.pop("remark")
    assert not snapshot.matches([layers])


@pytest.mark.parametrize(
    "register",
    [
        lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
        lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None),
        lambda layer: layer.register_load_state_dict_post_hook(lambda *_: None),
    ],
    ids=["state dict", "before a state dict", "before loading", "after loading"],
)
def test_hooks_that_concern_files_alone(layers, register):
    snapshot = snapshot_of(layers)
    register(layers[-1])
    assert snapshot.matches([layers])
    layers[-1].register_forward_pre_hook(lambda *_: None)
    assert not snapshot.matches([layers])


@pytest.mark.parametrize("column", range(8))
@pytest.mark.parametrize("step", [1, 2])
def test_each_of_eight_values_is_looked_at(step, column):
    linear = nn.Linear(8, 1, bias=False)
    linear.weight = nn.Parameter(torch.arange(16.0).view(1, 16)[:, 8 * (2 - step) :: step])
    snapshot = snapshot_of(linear)
    linear.weight.data[0, column] += 1
    assert not snapshot.matches([linear])


def test_values_that_are_exchanged(layers):
    layer = layers[-1]
    layer.remarks = nn.Buffer(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    snapshot = snapshot_of(layers)
    layer.remarks.data[0], layer.remarks.data[7] = 8.0, 1.0
    assert not snapshot.matches([layers])


def test_a_layer_that_holds_its_block(layers):
    """It is not walked through within itself, and a change behind it shows."""
    layers[0].block = layers
    snapshot = snapshot_of(layers)
    assert snapshot.matches([layers])
    write_in_place(layers[-1])
    assert not snapshot.matches([layers])


def test_what_is_gone(layers):
    """A snapshot of modules that have been replaced compares none of their freed memory."""
    snapshot = snapshot_of(layers)
    for index in range(len(layers)):
        layers[index] = nn.Linear(3, 4)
    assert not snapshot.matches([layers])
