"""The recorded loop over a block's layers against the loop itself, in Triton's interpreter, to the last bit.

A tape written in Python stands in for `densenet_efficient._C.LaunchTape`: it takes the kernels' arguments from the same
bytes. Whatever it hands out is full of NaN at first. `test_taped_layers.py` runs this file in a process of its own.
"""

import copy
import itertools
import struct
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from cases import make_images
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

import densenet_efficient._C
from densenet_efficient import EfficientDenseNet, dense_block, dense_layers, kernels, launch_recording, taped_layers
from densenet_efficient.stage import NO_EXIT, Layer, Stage

triton_interpreter.mend()

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's NumPy
MODEL = {"growth_rate": 16, "block_config": (2,), "num_init_features": 16, "bn_size": 2, "num_classes": 5}
OUTSIDE = torch.ones(2)
interpret = InterpretedFunction.run
launches = []  # the kernels of all launches, and the arguments that a tape does not know


class Interpreted:
    """What the interpreter lacks: a compiled kernel."""

    name = "interpreted"
    metadata = SimpleNamespace(
        num_ctas=1, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0, profile_scratch_size=0,
        num_warps=1, shared=0,
    )  # fmt: skip

    def __init__(self, kernel, arguments):
        is_constant = ["constexpr" in str(kernel.fn.__annotations__.get(name)) for name in kernel.arg_names]
        kinds = [
            "constexpr" if constant or value is None else f"*{value.dtype}" if torch.is_tensor(value) else "i64"
            for constant, value in zip(is_constant, arguments, strict=True)
        ]
        self.src = SimpleNamespace(signature=dict(enumerate(kinds)))
        launches.append((kernel, kinds, arguments))
        self.function = len(launches)


def run(self, *arguments, **options):
    """As the interpreter runs a kernel, but that it returns one, as a card's launch does."""
    with _disable_current_modes():  # the interpreter makes tensors too
        interpret(self, *arguments, **options)
    return Interpreted(self, arguments)


class Tape:
    """`densenet_efficient._C.LaunchTape`, but that it interprets."""

    repetitions = 0

    def __init__(self, scratch_bytes, given):
        self.scratch_bytes, self.results, self.steps = scratch_bytes, [], []

    def add_result(self, result):
        self.results.append((result.untyped_storage().nbytes(), result))

    def add_zeros(self, *step):
        self.steps.append(step)

    def add_launch(self, kernel, blocks, threads, shared_bytes, arguments, offsets, pointers):
        self.steps.append((*launches[kernel - 1], blocks, arguments, offsets, pointers))

    def repeat(self, given):
        Tape.repetitions += 1
        sizes = [size for size, _ in self.results]
        scratch, *results = (torch.full((size,), 0xFF, dtype=torch.uint8) for size in (self.scratch_bytes, *sizes))
        memories = [scratch, *given, *results]
        for step in self.steps:
            if len(step) == 3:
                memory, displacement, size = step
                part(memories[memory], displacement, torch.uint8)[:size] = 0
            else:
                self.launch(memories, *step)
        return [
            torch.empty(0, dtype=like.dtype).set_(
                made.untyped_storage(), like.storage_offset(), like.shape, like.stride()
            )
            for made, (_, like) in zip(results, self.results, strict=True)
        ]

    def launch(self, memories, kernel, kinds, template, blocks, packed, offsets, pointers):
        assert all(blocks)
        places = {offset: place for offset, *place in pointers}
        offsets = iter(offsets)
        arguments = []
        for kind, value in zip(kinds, template, strict=True):
            if kind == "constexpr":
                arguments.append(value)
                continue
            offset = next(offsets)
            if kind.startswith("*"):
                memory, displacement = places.pop(offset)
                arguments.append(part(memories[memory], displacement, value.dtype))
            else:
                arguments.append(struct.unpack_from("q", packed, offset)[0])
        assert not places
        assert len(list(offsets)) == launch_recording.SCRATCH_POINTERS
        kernel[blocks](*arguments)


def part(memory, displacement, dtype):
    """Everything from so many bytes behind the first element of a tensor on."""
    storage = memory.untyped_storage()
    start = memory.data_ptr() - storage.data_ptr() + displacement
    size = (storage.nbytes() - start) // dtype.itemsize * dtype.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(storage)[start : start + size].view(dtype)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "triton")
    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(densenet_efficient._C, "LaunchTape", Tape, raising=False)
    monkeypatch.setattr(densenet_efficient._C, "kernel_takes", lambda *_: True, raising=False)
    monkeypatch.setattr(densenet_efficient._C, "layout_of", layout_of, raising=False)
    monkeypatch.setattr(kernels, "empty_kept", lambda like, *size: like.new_empty(size))
    monkeypatch.setattr(dense_block, "_prepared", lambda stage, x: stage.in_dtype(x.dtype))
    monkeypatch.setattr(dense_layers, "recomputes_gradients", lambda device: True)  # as on a card
    taped_layers._tapes.clear()
    Tape.repetitions = 0


def layout_of(tensors):
    return tuple((t.dtype, t.device, t.shape, t.stride()) for t in tensors)


def tape_everything(stage, backend, x):
    return x.dtype.itemsize == 2


def tape_nothing(stage, backend, x):
    return False


def step(model, images):
    """The loss and the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), torch.arange(len(images)))
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def assert_same_bits(monkeypatch, model, batches):
    """Three times and more, each with other images and weights, against a model whose loops are not recorded."""
    twin = copy.deepcopy(model)
    for images in batches:
        monkeypatch.setattr(taped_layers, "can_run", tape_nothing)
        expected = step(twin, images)
        monkeypatch.setattr(taped_layers, "can_run", tape_everything)
        found = step(model, images)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
        with torch.no_grad():
            for parameter in (*model.parameters(), *twin.parameters()):
                parameter.mul_(0.9)


def make_model(**options):
    torch.manual_seed(0)
    return EfficientDenseNet(**MODEL, **options)


def batches(number, images=2, size=(12, 16)):
    return [make_images(images, 3, *size, dtype=torch.float32) + index for index in range(number)]


def test_recomputed_bottlenecks(monkeypatch):
    assert_same_bits(monkeypatch, make_model(checkpointing="bottleneck"), batches(3))
    assert Tape.repetitions == 2  # forward and backward of the third step


def test_free_bottlenecks(monkeypatch):
    model = make_model(checkpointing="bottleneck")
    model.features.denseblock1.free_bottlenecks = {"cpu": 1}  # of two
    assert_same_bits(monkeypatch, model, batches(3))
    assert Tape.repetitions == 2


def test_several_layouts_in_turn(monkeypatch):
    sizes = batches(3), batches(3, images=1)
    model = make_model(checkpointing="none").to(memory_format=torch.channels_last)
    assert_same_bits(monkeypatch, model, itertools.chain(*zip(*sizes, strict=True)))
    assert Tape.repetitions == 2 * 2


def test_frozen_parameters(monkeypatch):
    model = make_model(checkpointing="none")
    for module in (model.features.denseblock1.denselayer2, model.features.conv0, model.features.norm0):
        module.requires_grad_(False)
    assert_same_bits(monkeypatch, model, batches(3))
    assert Tape.repetitions == 2


def test_running_statistics(monkeypatch):
    model = make_model(checkpointing="none").eval()
    assert_same_bits(monkeypatch, model, batches(3))
    model.requires_grad_(False)  # then no bottleneck is kept for a backward: another loop
    assert_same_bits(monkeypatch, model, batches(3))
    assert Tape.repetitions == 2 + 1


def test_another_epsilon(monkeypatch):
    model = make_model(checkpointing="none")
    assert_same_bits(monkeypatch, model, batches(3))
    model.features.denseblock1.denselayer1.norm2.eps = 0.1
    assert_same_bits(monkeypatch, model, batches(3))
    assert Tape.repetitions == 2 * 2


def test_sizes_of_as_many_pixels(monkeypatch):
    model = make_model(checkpointing="none")
    assert_same_bits(monkeypatch, model, batches(3, size=(12, 16)))
    assert_same_bits(monkeypatch, model, batches(1, size=(16, 12)))
    assert Tape.repetitions == 2


def test_an_exit_that_takes_statistics_after_one_that_does_not(monkeypatch):
    """The layers never do."""
    model = make_model(checkpointing="none")
    model.features.denseblock1.eval()
    model.features.norm5.eval()
    assert_same_bits(monkeypatch, model, batches(3))
    model.features.norm5.train()
    assert_same_bits(monkeypatch, model, batches(1))
    assert Tape.repetitions == 2


def test_an_input_that_needs_a_gradient_after_one_that_does_not(monkeypatch):
    model = make_model(checkpointing="none")
    stem = torch.nn.ModuleList([model.features.conv0, model.features.norm0])
    stem.requires_grad_(False)
    assert_same_bits(monkeypatch, model, batches(3))
    stem.requires_grad_(True)
    assert_same_bits(monkeypatch, model, batches(1))
    assert Tape.repetitions == 2 + 1  # the forward knows of no difference


def test_one_layer_frozen_and_then_another(monkeypatch):
    """Of the same shapes."""
    model = make_model(checkpointing="none")
    layer1, layer2 = model.features.denseblock1.children()
    layer1.norm2.requires_grad_(False)
    assert_same_bits(monkeypatch, model, batches(3))
    layer1.norm2.requires_grad_(True)
    layer2.norm2.requires_grad_(False)
    assert_same_bits(monkeypatch, model, batches(1))
    assert Tape.repetitions == 2 + 1


def test_running_statistics_of_one_norm_and_then_another(monkeypatch):
    """Of the same shapes."""
    model = make_model(checkpointing="none")
    layer1, layer2 = model.features.denseblock1.children()
    layer1.norm2.eval()
    assert_same_bits(monkeypatch, model, batches(3))
    layer1.norm2.train()
    layer2.norm1.eval()
    assert_same_bits(monkeypatch, model, batches(1))
    assert Tape.repetitions == 2


def test_parameters_of_another_dtype(monkeypatch):
    model = make_model(checkpointing="none")
    assert_same_bits(monkeypatch, model, batches(3))
    norm = next(model.features.denseblock1.children()).norm2
    norm.weight.data = norm.weight.data.bfloat16()
    assert_same_bits(monkeypatch, model, batches(1))
    assert Tape.repetitions == 2


def test_weights_are_cast_once_and_for_all():
    convolutions = {"conv1": torch.randn(8, 4, 1, 1), "conv2": torch.randn(4, 8, 3, 3)}
    layer = Layer(norm1=None, norm2=None, dilation=1, dropout=None, **convolutions)
    stage = Stage([layer], NO_EXIT, None, None, None, drop_rate=0)
    cast = stage.in_dtype(torch.bfloat16)
    for weight, own in zip(cast.layers[0].convolutions, convolutions.values(), strict=True):
        assert torch.equal(weight, own.bfloat16()) and weight.is_contiguous(memory_format=torch.channels_last)
    assert cast.in_dtype(torch.bfloat16) is cast


def test_no_images(monkeypatch):
    """Then some grids are empty, which Triton does not launch and the driver refuses."""
    monkeypatch.setattr(taped_layers, "can_run", tape_everything)
    model = make_model().eval()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.zeros(0, 3, 12, 16)).shape == (0, MODEL["num_classes"])
    assert Tape.repetitions == 1


def test_the_oldest_tape_makes_way(monkeypatch):
    monkeypatch.setattr(taped_layers, "MOST_TAPES", 2)
    stage = Stage([], NO_EXIT, None, None, None, drop_rate=0)
    for size in (1, 2, 3) * 3:
        x = torch.ones(size)
        taped_layers._run(("loop",), lambda x=x: [x.new_zeros(len(x))], stage, [x])
    assert len(taped_layers._tapes) == 2
    assert Tape.repetitions == 0  # three layouts take turns


def test_a_tape_that_is_used_stays(monkeypatch):
    monkeypatch.setattr(taped_layers, "MOST_TAPES", 2)
    stage = Stage([], NO_EXIT, None, None, None, drop_rate=0)
    for size in (1, 1, 2, 1, 3, 1):
        x = torch.ones(size)
        taped_layers._run(("loop",), lambda x=x: [x.new_zeros(len(x))], stage, [x])
    assert Tape.repetitions == 2


@pytest.mark.parametrize(
    ("loop", "obstacle"),
    [
        (lambda x: x.mul(2), "aten.mul.Tensor is not recorded"),
        (lambda x: x.new_zeros(2).add_(1), "aten.add_.Tensor is not recorded"),
        (lambda x: x.new_zeros(2).add_(x[0, 0]), "aten.add_.Tensor is not recorded"),
        (lambda x: x.new_zeros(2).add_(x[0], alpha=2), "aten.add_.Tensor is not recorded"),
        (lambda x: x.new_zeros(2, dtype=torch.float64).add_(x[0]), "aten.add_.Tensor is not recorded"),
        (lambda x: x.new_zeros(2, 2).add_(x.t()), "aten.add_.Tensor is not recorded"),
        (lambda x: x.new_zeros(2, 4)[:, ::2].add_(x.new_zeros(2, 4)[:, ::2]), "aten.add_.Tensor is not recorded"),
        (lambda x: x.new_zeros(2).add_(OUTSIDE), "a tensor that was neither given nor made"),
        (lambda x: x.to(torch.float64).new_empty(2), "is not recorded"),
        (lambda x: x[0], "results that share their memory"),
    ],
)
def test_what_cannot_be_recorded_is_named(loop, obstacle):
    x = torch.ones(2, 2)
    with launch_recording.Recording([x], []) as recording:
        result = loop(x)
    assert recording.tape([result]) is None
    assert obstacle in recording.obstacle


def test_results_have_a_memory_each():
    x = torch.ones(2, 2)
    with launch_recording.Recording([x], []) as recording:
        result = x.new_zeros(2)
    assert recording.tape([result, result[:1]]) is None
    assert recording.obstacle == "results that share their memory"


@pytest.mark.parametrize(
    ("setting", "obstacle"),
    [
        ({"num_ctas": 2}, "interpreted is launched in a way of its own"),
        ({"launch_cooperative_grid": True}, "interpreted is launched in a way of its own"),
        ({"launch_pdl": True}, "interpreted is launched in a way of its own"),
        ({"global_scratch_size": 8}, "interpreted needs memory from Triton"),
        ({"profile_scratch_size": 8}, "interpreted needs memory from Triton"),
    ],
)
def test_kernels_that_need_more_than_their_arguments_are_not_recorded(monkeypatch, setting, obstacle):
    monkeypatch.setattr(Interpreted, "metadata", SimpleNamespace(**vars(Interpreted.metadata) | setting))
    x = torch.ones(2, 2)
    with launch_recording.Recording([x], []) as recording:
        result = x.new_zeros(2).add_(x[0])
    assert recording.tape([result]) is None
    assert recording.obstacle == obstacle


class MisalignedTape(Tape):
    def repeat(self, given):
        return None


@pytest.mark.parametrize(("name", "answer"), [("kernel_takes", lambda *_: False), ("LaunchTape", MisalignedTape)])
def test_what_is_not_repeated_runs_as_a_loop(monkeypatch, name, answer):
    """Where a kernel takes other arguments than Triton's names say, and where a tensor is aligned otherwise."""
    monkeypatch.setattr(densenet_efficient._C, name, answer)
    stage, x = Stage([], NO_EXIT, None, None, None, drop_rate=0), torch.ones(2, 2)

    def loop():
        return [x.new_zeros(2).add_(x[0]), None]

    for factor in range(1, 5):
        x.fill_(factor)
        found = taped_layers._run(("loop",), loop, stage, [x])
        assert found[0].tolist() == [factor, factor] and found[1] is None
    assert Tape.repetitions == 0


def test_results_that_nobody_needs_keep_their_places():
    stage, x = Stage([], NO_EXIT, None, None, None, drop_rate=0), torch.ones(2, 2)
    for factor in range(1, 5):
        x.fill_(factor)
        found = taped_layers._run(("loop",), lambda: [None, x.new_zeros(2).add_(x[0]), None], stage, [x])
        assert found[0] is None and found[1].tolist() == [factor, factor] and found[2] is None
    assert Tape.repetitions == 2


def test_tensors_that_share_their_memory_are_not_told_apart():
    x = torch.ones(2, 2)
    assert launch_recording.Recording([x, x[0]], []).obstacle == "tensors that share their memory"
    assert launch_recording.Recording([], [x, x.flatten()]).obstacle == "tensors that share their memory"
    assert launch_recording.Recording([], [x[0], x[1]]).obstacle is None


def test_what_is_made_may_be_added():
    x = torch.ones(2, 2)
    with launch_recording.Recording([x], []) as recording:
        recorded = x.new_zeros(2).add_(x[0])
    tape = recording.tape([recorded])
    assert recorded.tolist() == [1, 1]
    assert tape.repeat([torch.tensor([[5.0, 6.0], [7.0, 8.0]])])[0].tolist() == [5, 6]


def test_parts_of_what_is_given_are_found_from_its_beginning():
    """Which need not be that of its memory."""
    x = torch.ones(4, 2)[1:]
    with launch_recording.Recording([x], []) as recording:
        recorded = x.new_zeros(2).add_(x[1])
    later = torch.arange(8.0).view(4, 2)
    assert recording.tape([recorded]).repeat([later[2:]])[0].tolist() == [6, 7]


def test_a_launch_is_recorded_as_it_was_compiled(monkeypatch):
    compiled = SimpleNamespace(**vars(Interpreted.metadata) | {"num_warps": 4, "shared": 1000})
    monkeypatch.setattr(Interpreted, "metadata", compiled)
    added = []
    monkeypatch.setattr(Tape, "add_launch", lambda self, *launch: added.append(launch))
    x = torch.ones(3000)
    with launch_recording.Recording([x], []) as recording:
        result = x.new_zeros(3000).add_(x)
    recording.tape([result])
    ((_, blocks, threads, shared_bytes, *_),) = added
    assert (blocks, threads, shared_bytes) == ((3, 1, 1), 128, 1000)
    assert recording.kernels() == [recording._steps[-1].compiled]


def test_arguments_lie_where_a_kernel_looks_for_them():
    """Each at a multiple of its size, and two more pointers behind them."""
    address = launch_recording.Address(1, 8)
    arguments = [("i32", 7), ("*bf16", address), ("i32", -1), ("i64", 9), ("i32", 5)]
    packed, layout, pointers = launch_recording._pack(arguments)
    assert struct.unpack("@iPiqiPP", packed) == (7, 0, -1, 9, 5, 0, 0)
    assert layout == [(0, 4), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 8)]
    assert pointers == [(8, address)]


def test_memories_in_use_at_the_same_time_lie_side_by_side():
    lives = [(100, 0, 2), (600, 1, 1), (50, 2, 3), (512, 3, 3)]  # bytes, first and last launch
    memories = [launch_recording.Memory(*life) for life in lives]
    total, offsets = launch_recording._lay_out(memories)
    assert [offsets[memory] for memory in memories] == [0, 512, 512, 0]
    assert total == 512 + 600


def test_a_memory_that_fits_no_gap_lies_behind_all_others():
    lives = [(512, 0, 3), (512, 0, 1), (512, 0, 3), (600, 2, 3), (512, 2, 3)]  # bytes, first and last launch
    memories = [launch_recording.Memory(*life) for life in lives]
    total, offsets = launch_recording._lay_out(memories)
    assert [offsets[memory] for memory in memories] == [0, 512, 1024, 1536, 512]
    assert total == 1536 + 600
