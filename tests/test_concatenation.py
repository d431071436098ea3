"""`concatenate` against `torch.cat`: values, gradients, what is saved, and that no result ever changes."""

import contextlib
import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import assert_close, loss_of, make_images, saved_bytes
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_efficient import concatenate
from densenet_efficient.concatenation import Room

pytestmark = pytest.mark.usefixtures("one_thread", "nan_memory")

CHANNELS, GROWTH_RATE, LAYERS = 5, 3, 6
TOTAL = CHANNELS + LAYERS * GROWTH_RATE
SIZES = {1: (13,), 2: (6, 7), 3: (4, 5, 3)}
HINTS = {"channels": TOTAL, "more channels": TOTAL + 4, "no hint": None}
every_hint = pytest.mark.parametrize("channels", HINTS.values(), ids=HINTS)


class Grower(nn.Module):
    """Features grown by hand, each layer reading all before it."""

    def __init__(self, concatenation, dims=2, layers=LAYERS):
        super().__init__()
        self.concatenation = concatenation
        kinds = {1: (nn.Conv1d, nn.BatchNorm1d), 2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}
        convolution, norm = kinds[dims]
        self.layers = nn.ModuleList()
        for index in range(layers):
            conv = convolution(CHANNELS + index * GROWTH_RATE, GROWTH_RATE, 3, padding=1)
            self.layers.append(nn.Sequential(conv, norm(GROWTH_RATE), nn.LeakyReLU(0.2)))

    def forward(self, x):
        for layer in self.layers:
            x = self.concatenation([x, layer(x)])
        return x


def naive(tensors):
    return torch.cat(tensors, 1)


def sharing(channels):
    return lambda tensors: concatenate(tensors, channels)


def make_pair(channels=TOTAL, dims=2, layers=LAYERS):
    """(with torch.cat, with concatenate) of equal weights."""
    torch.manual_seed(0)
    model = Grower(naive, dims, layers).double()
    other = copy.deepcopy(model)
    other.concatenation = sharing(channels)
    return model, other


def results_of(model, images):
    images = images.detach().requires_grad_()
    features = model(images)
    loss_of(features).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"features": features, "images": images.grad, **gradients, **dict(model.named_buffers())}


@every_hint
@pytest.mark.parametrize("dims", SIZES)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_the_same_as_cat(dims, channels, layout):
    pair = make_pair(channels, dims)
    images = make_images(2, CHANNELS, *SIZES[dims])
    if layout == "channels last":
        images = make_images(2, *SIZES[dims], CHANNELS).movedim(-1, 1)
    expected, results = (results_of(model, images) for model in pair)
    assert_close(results, expected)
    with torch.no_grad():
        assert_close({"": pair[1](images)}, {"": pair[0](images)})


def test_one_storage_in_the_layout_of_the_first():
    """Only the new channels are copied: every result begins where the first one does."""
    images = make_images(2, CHANNELS, 6, 7).contiguous(memory_format=torch.channels_last)
    results = [images]
    for _ in range(4):
        results.append(concatenate([results[-1], make_images(2, GROWTH_RATE, 6, 7)], channels=TOTAL))
    assert len({result.data_ptr() for result in results[1:]}) == 1
    assert results[-1].stride() == (6 * 7 * TOTAL, 1, 7 * TOTAL, TOTAL)
    assert concatenate([make_images(2, 5, 6, 7), images]).stride() == (6 * 7 * 20, 6 * 7, 7, 1)


def test_results_never_change():
    torch.manual_seed(0)
    result = make_images(2, CHANNELS, 6, 7)
    expected, kept = [], []
    for _ in range(LAYERS):
        result = concatenate([result, torch.randn(2, GROWTH_RATE, 6, 7, dtype=torch.float64)], channels=TOTAL)
        kept.append(result)
        expected.append(result.clone())
    assert_close(dict(enumerate(kept)), dict(enumerate(expected)), 0)


def test_two_continuations_of_one_result():
    """The second one finds the room taken and gets a storage of its own."""
    first, second, third = (make_images(2, 3, 4, 4, seed=seed).requires_grad_() for seed in range(3))
    results = []
    for concatenation in (naive, sharing(12)):
        start = concatenation([first, second])
        one, other = concatenation([start, second * 2]), concatenation([start, third])
        further = concatenation([one, third]), concatenation([other, first])
        gradients = torch.autograd.grad(sum(map(loss_of, (start, one, other, *further))), (first, second, third))
        results.append(dict(enumerate((start, one, other, *further, *gradients))))
    assert_close(*results)


def test_two_threads_continue_one_result(monkeypatch):
    """Each looks whether there is room before the other writes, where nothing keeps it from that."""
    first = concatenate([make_images(2, CHANNELS, 6, 7)], channels=TOTAL)
    rest = [make_images(2, GROWTH_RATE, 6, 7, seed=seed) for seed in (1, 2)]
    looked, is_behind = threading.Barrier(2), Room.is_behind

    def is_behind_for_both(room, result):
        found = is_behind(room, result)
        with contextlib.suppress(threading.BrokenBarrierError):
            looked.wait(timeout=0.5)
        return found

    monkeypatch.setattr(Room, "is_behind", is_behind_for_both)
    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(lambda new: concatenate([first, new], channels=TOTAL), rest))
    assert all(torch.equal(result, torch.cat([first, new], 1)) for result, new in zip(results, rest, strict=True))


def test_several_at_once_and_more_than_promised():
    tensors = [make_images(2, channels, 4, 4, seed=channels).requires_grad_() for channels in (3, 2, 4)]
    results = []
    for concatenation in (naive, concatenate):
        out = concatenation([concatenation(tensors), *tensors, tensors[0]])
        results.append({"out": out, **dict(enumerate(torch.autograd.grad(loss_of(out), tensors)))})
    assert_close(*results)


def test_derivatives_of_second_order():
    def grown(x, y):
        for _ in range(3):
            x = concatenate([x, x[:, :2].sin() * y], channels=8)
        return x

    inputs = [make_images(1, 2, 2, 2, seed=seed).requires_grad_() for seed in range(2)]
    assert torch.autograd.gradcheck(grown, inputs)
    assert torch.autograd.gradgradcheck(grown, inputs)


def test_saves_one_storage():
    """What is saved grows with the layers as one storage does, not as their square."""
    layers = 24
    channels = CHANNELS + layers * GROWTH_RATE
    model, sharing_model = (model.float() for model in make_pair(channels, layers=layers))
    images = make_images(2, CHANNELS, 16, 16, dtype=torch.float32)
    naive_bytes, saved = (saved_bytes(each, images) for each in (model, sharing_model))
    storage = 2 * channels * 16 * 16 * 4
    outputs = 2 * 2 * layers * GROWTH_RATE * 16 * 16 * 4  # of each convolution and norm
    assert saved <= 1.1 * (storage + outputs) + images.nbytes
    assert naive_bytes > 4 * saved


def test_nothing_stays_behind():
    model = make_pair()[1]
    images = make_images(2, CHANNELS, 6, 7)
    features = model(images)
    storage = weakref.ref(features._base)
    del features
    gc.collect()
    assert storage() is None


def test_dtypes_are_promoted_as_cat_does():
    """The features of autocast join those of float32, in one storage."""
    results = []
    for model in make_pair():
        images = make_images(2, CHANNELS, 6, 7, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(results_of(model.float(), images))
    assert results[1]["features"].dtype == torch.float32
    assert results[1]["features"]._base.shape[1] == TOTAL
    assert_close(results[1], results[0], 0)
    start = concatenate([make_images(1, 2, 3, 3, dtype=torch.float32)] * 2, channels=8)
    assert concatenate([start, make_images(1, 2, 3, 3)]).dtype == torch.float64
    assert concatenate([start, start]).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*trac")
def test_compiled_traced_vectorised_and_in_inference_mode():
    model, other = make_pair()
    images = make_images(2, CHANNELS, 6, 7)
    model.eval()
    other.eval()
    expected = model(images)
    assert_close({"": torch.compile(other, fullgraph=True, backend="aot_eager")(images)}, {"": expected})
    assert_close({"": torch.jit.trace(other, images)(images)}, {"": expected})
    assert_close({"": torch.vmap(other, chunk_size=1)(images[:, None])[:, 0]}, {"": expected})
    with torch.inference_mode():
        assert_close({"": other(images)}, {"": expected})


def test_forward_mode_derivatives():
    x, tangent, others = (make_images(2, CHANNELS, 6, 7, seed=seed) for seed in range(3))
    grown = concatenate([others, others], channels=TOTAL)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        for tensors in ([dual, others], [grown, dual]):
            value, derivative = forward_ad.unpack_dual(concatenate(tensors))
            expected = forward_ad.unpack_dual(torch.cat(tensors, 1))
            assert torch.equal(value, expected.primal) and torch.equal(derivative, expected.tangent)


class Named(torch.Tensor):
    """A kind of tensor of the user's."""


class Watching(TorchDispatchMode):
    """Writes down which operations run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.seen.append(operation)
        return operation(*args, **kwargs or {})


@pytest.mark.filterwarnings("ignore:.*trac")
def test_whoever_watches_sees_cat():
    tensors = make_images(1, 2, 3, 3), make_images(1, 2, 3, 3, seed=1)
    with Watching() as watching:
        concatenate(tensors)
    assert watching.seen == [torch.ops.aten.cat.default]
    graph = torch.jit.trace(lambda *given: concatenate(given), tensors).graph
    assert [node.kind() for node in graph.nodes() if "aten" in node.kind()] == ["aten::cat"]


def test_what_has_room():
    """Images and parameters; neither what an inference gives nor tensors of another kind or layout."""
    images = make_images(1, 2, 3, 3)
    for first in (images, nn.Parameter(images)):
        assert concatenate([first, images], channels=8)._base.shape == (1, 8, 3, 3)
    with torch.inference_mode():
        assert concatenate([images, images], channels=8).untyped_storage().nbytes() == 2 * images.nbytes
    assert type(concatenate([images.as_subclass(Named), images])) is Named
    assert concatenate([images.to_sparse()] * 2).layout == torch.sparse_coo


def test_a_copy_has_no_room():
    start = concatenate([make_images(1, 2, 3, 3), make_images(1, 2, 3, 3, seed=1)], channels=8)
    duplicate = copy.deepcopy(start)
    result = concatenate([duplicate, make_images(1, 2, 3, 3)], channels=8)
    assert_close({"": result}, {"": torch.cat([start, make_images(1, 2, 3, 3)], 1)}, 0)
    assert_close({"": start[:, 2:]}, {"": make_images(1, 2, 3, 3, seed=1)}, 0)


@pytest.mark.parametrize(
    "other",
    [
        lambda data: data.transpose(2, 3),
        lambda data: make_images(1, 8, 3, 3, seed=3)[:, :4],  # of the same strides
        lambda data: data.view(torch.int64),  # in the same memory
    ],
    ids=["layout", "memory", "dtype"],
)
def test_a_result_of_other_data_has_no_room(other):
    start = concatenate([make_images(1, 2, 3, 3), make_images(1, 2, 3, 3, seed=1)], channels=8)
    start.data = other(start.data)
    more = make_images(1, 2, 3, 3, seed=2).to(start.dtype)
    assert torch.equal(concatenate([start, more]), torch.cat([start, more], 1))


# Bad input


def test_changes_in_place_are_refused():
    tensors = [make_images(1, 2, 3, 3).requires_grad_(), make_images(1, 2, 3, 3, seed=1)]
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        concatenate(tensors).relu_()
    with torch.no_grad():
        result = concatenate(tensors, channels=8)
        result.relu_()
        with pytest.raises(RuntimeError, match=r"changed in place.*clone") as caught:
            concatenate([result, tensors[1]])
    assert "\n" not in str(caught.value)


def test_a_change_in_place_before_the_backward_is_refused():
    x = make_images(1, 2, 3, 3).requires_grad_()
    start = concatenate([x, x * 2], channels=6)
    result = concatenate([start, start[:, :2].square()])
    with torch.no_grad():
        result.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        loss_of(start.square()).backward()


@pytest.mark.parametrize(
    "tensors",
    [
        [],
        [1.0],
        None,
        [torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)],
        [torch.zeros(1, 2, 3), torch.zeros(1, 2)],
        [torch.zeros(2, 2, 3), torch.zeros(1, 2, 3)],
        [torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta")],
        [torch.zeros(3)],
        torch.zeros(1, 2, 3),
    ],
    ids=str,
)
def test_errors_are_those_of_cat(tensors):
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)) as expected:
        torch.cat(tensors, 1)
    with pytest.raises(type(expected.value)):
        concatenate(tensors)


def test_too_few_channels():
    with pytest.raises(ValueError, match="channels must be at least the 4 that are concatenated, got 3"):
        concatenate([torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)], channels=3)
    with pytest.raises(TypeError, match="channels must be an int, got '7'"):
        concatenate([torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)], channels="7")
