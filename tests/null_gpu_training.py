"""What the host does in a step on a GPU: launches, graphs, waits. Runs where the GPU does nothing (tests/null_gpu).

`test_null_gpu.py` runs this file in a process of its own. Whatever is computed here is meaningless.
"""

import ctypes
import os
import struct

import pytest
import torch
import torch.nn.functional as F

from densenet_efficient import _C, EfficientDenseNet, taped_layers

MODEL = {"growth_rate": 16, "block_config": (3, 2), "num_init_features": 32, "bn_size": 4, "num_classes": 10}
STAGES = len(MODEL["block_config"])
LIBRARY = ctypes.CDLL(os.environ["LD_PRELOAD"])
FIELDS = ("launches", "graph_launches", "launches_in_graphs", "changed_launches", "graphs", "waits", "unordered_nodes")


class Counts(ctypes.Structure):
    """`null_gpu_counts` of null_gpu.h."""

    _fields_ = [(name, ctypes.c_long) for name in FIELDS]


class Latest(ctypes.Structure):
    """`null_gpu_launch` of null_gpu.h."""

    _fields_ = [
        ("kernel", ctypes.c_size_t),
        ("blocks", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("first_argument", ctypes.c_size_t),
        ("zero_bytes", ctypes.c_size_t),
    ]


COUNTS = Counts.in_dll(LIBRARY, "null_gpu_counts")


def counted(function, *arguments):
    """What the GPU is asked to do meanwhile, by the names of `Counts`."""
    before = [getattr(COUNTS, name) for name in FIELDS]
    function(*arguments)
    return {name: getattr(COUNTS, name) - count for name, count in zip(FIELDS, before, strict=True)}


@pytest.fixture(autouse=True)
def no_tapes(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # its answers are not imitated
    taped_layers._tapes.clear()
    assert COUNTS.graphs == 0
    yield
    for refused in ("graphs", "changes"):
        refuses(refused, False)


def refuses(what, does=True):
    """Whether the GPU refuses graphs, or changes of their launches."""
    ctypes.c_int.in_dll(LIBRARY, f"null_gpu_refuses_{what}").value = does


class Training:
    """As a user's loop has it, with new images each time."""

    def __init__(self, level="none"):
        self.model = EfficientDenseNet(**MODEL, checkpointing=level).cuda().to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.kept = []

    def step(self, size=64):
        images = torch.zeros(4, 3, size, size, device="cuda").to(memory_format=torch.channels_last)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(self.model(images), torch.zeros(4, dtype=torch.long, device="cuda"))
        loss.backward()
        self.optimizer.step()

    def steps(self, number):
        for _ in range(number):
            self.step()

    def keeping_steps(self, number):
        """With gradients that live on, so that a step finds its memory elsewhere than those before it."""
        for _ in range(number):
            self.step()
            self.kept.extend(parameter.grad for parameter in self.model.parameters())


@pytest.mark.parametrize("level", ["none", "bottleneck"])
def test_a_stage_is_launched_as_one_graph(level):
    training = Training(level)
    training.steps(2)
    one_by_one = counted(training.step)
    assert one_by_one["graph_launches"] == 0
    training.steps(6)
    step = counted(training.step)
    assert step["graph_launches"] == 2 * STAGES  # forward and backward
    assert step["launches"] + step["launches_in_graphs"] == one_by_one["launches"]
    assert step["graphs"] == 0  # all of them are there


@pytest.mark.parametrize("level", ["none", "bottleneck"])
def test_launches_are_changed_where_their_memory_has_moved(level):
    training = Training(level)
    training.steps(12)
    at_rest = counted(training.step)
    training.keeping_steps(6)
    moving = counted(training.keeping_steps, 1)
    assert at_rest["changed_launches"] == 0
    assert moving["graph_launches"] == 2 * STAGES
    assert moving["changed_launches"] > 0.3 * moving["launches_in_graphs"]


def test_a_step_never_waits_for_the_gpu():
    training = Training()
    training.steps(1)
    assert counted(training.steps, 6)["waits"] == 0


def test_layouts_have_graphs_of_their_own():
    training = Training()
    for _ in range(8):
        training.step(size=64)
        training.step(size=96)
    for size in (64, 96):
        assert counted(lambda size=size: training.step(size=size))["graph_launches"] == 2 * STAGES


def test_where_cuda_refuses_graphs_all_is_launched():
    refuses("graphs")
    training = Training()
    training.keeping_steps(2)
    first = counted(training.keeping_steps, 1)
    training.keeping_steps(6)
    last = counted(training.keeping_steps, 1)
    assert last["graph_launches"] == COUNTS.graphs == 0
    assert last["launches"] == first["launches"]


def test_graphs_are_tried_again_ever_more_rarely():
    """The card may have had no memory for them."""
    refuses("graphs")
    memory = torch.empty(1024, device="cuda")
    tape = _C.LaunchTape(0, [memory])
    tape.add_zeros(1, 0, 16)
    for _ in range(9):  # tries with the second, the fourth and the eighth
        tape.repeat([memory])
    refuses("graphs", False)
    launched = [counted(tape.repeat, [memory])["graph_launches"] for _ in range(8)]
    assert launched == [0] * 6 + [1] * 2
    assert tape.graphs == 1


def test_where_cuda_refuses_changes_all_is_launched():
    training = Training()
    training.keeping_steps(2)
    first = counted(training.keeping_steps, 1)
    refuses("changes")
    for _ in range(12):
        step = counted(training.keeping_steps, 1)
        assert step["launches"] + step["launches_in_graphs"] == first["launches"]
    assert step["graph_launches"] < 2 * STAGES


def latest():
    """What the GPU was told of the latest launch, which it forgets."""
    launch = Latest.in_dll(LIBRARY, "null_gpu_latest")
    told = [tuple(value) if isinstance(value, ctypes.Array) else value for value in map(launch.__getattribute__, NAMES)]
    ctypes.memset(ctypes.byref(launch), 0, ctypes.sizeof(launch))
    return tuple(told)


NAMES = [name for name, _ in Latest._fields_]
# One by one, in a graph that is made, in two more graphs, and in one that is changed.
TURNS = (0, 0, 1, 2, 3)


@pytest.mark.parametrize("memory", [1, 2], ids=["given", "result"])
def test_a_launch_is_as_it_was_recorded(memory):
    given = [torch.empty(1024, device="cuda") for _ in TURNS]
    tape = _C.LaunchTape(0, given[:1])
    tape.add_result(torch.empty(12, device="cuda")[4:])  # its place is that of its memory
    tape.add_launch(5000, (2, 3, 4), 64, 48, struct.pack("Pi", 0, 7), [0, 8], [(0, memory, 16)])
    kept = []
    for index in TURNS:
        kept += tape.repeat([given[index]])
        place = (given[index] if memory == 1 else kept[-1]).untyped_storage().data_ptr()
        assert latest() == (5000, (2, 3, 4), (64, 1, 1), 48, place + 16, 0)


def test_the_launches_of_a_graph_follow_each_other():
    memory = torch.empty(1024, device="cuda")
    tape = _C.LaunchTape(0, [memory])
    for _ in range(2):
        tape.add_zeros(1, 0, 16)
        tape.add_launch(5000, (1, 1, 1), 32, 0, struct.pack("P", 0), [0], [(0, 1, 0)])
    tape.repeat([memory])
    repetition = counted(tape.repeat, [memory])
    assert (repetition["launches_in_graphs"], repetition["unordered_nodes"]) == (4, 0)


def test_the_graph_that_was_used_longest_ago_is_changed():
    given = [torch.empty(1024, device="cuda") for _ in range(4)]
    tape = _C.LaunchTape(0, given[:1])
    tape.add_zeros(1, 0, 16)
    changed = [counted(tape.repeat, [given[index]])["changed_launches"] for index in (0, 0, 1, 2, 3, 1, 2, 3)]
    assert changed == [0, 0, 0, 0, 1, 0, 0, 0]


def test_zeros_are_where_they_were_recorded():
    given = [torch.empty(1024, device="cuda") for _ in TURNS]
    tape = _C.LaunchTape(0, given[:1])
    tape.add_zeros(1, 32, 100)
    for index in TURNS:
        tape.repeat([given[index]])
        assert latest() == (0, (0, 0, 0), (0, 0, 0), 0, given[index].data_ptr() + 32, 100)


def test_the_current_stream_takes_the_launches():
    memory = torch.empty(1024, device="cuda")
    tape = _C.LaunchTape(0, [memory])
    tape.add_zeros(1, 0, 16)
    used = ctypes.c_size_t.in_dll(LIBRARY, "null_gpu_stream")
    for _ in range(3):  # one by one and as a graph
        for stream in (torch.cuda.Stream(), torch.cuda.default_stream()):
            with torch.cuda.stream(stream):
                tape.repeat([memory])
            assert used.value == stream.cuda_stream


def test_results_are_laid_out_as_those_recorded():
    images = torch.empty(2, 4, 3, 5, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    tape = _C.LaunchTape(0, [torch.empty(4, device="cuda")])
    for result in (images, images[:, 1:3], torch.empty(7, device="cuda")[2:]):
        tape.add_result(result)
    first, second = (tape.repeat([torch.empty(4, device="cuda")]) for _ in range(2))
    for results in (first, second):
        whole, cut, vector = results
        assert (whole.dtype, whole.shape, whole.stride()) == (torch.bfloat16, (2, 4, 3, 5), (60, 1, 20, 4))
        assert (cut.shape, cut.stride(), cut.storage_offset()) == ((2, 2, 3, 5), (60, 1, 20, 4), 1)
        assert (vector.dtype, vector.shape, vector.storage_offset()) == (torch.float32, (5,), 2)
        assert [result.untyped_storage().nbytes() for result in results] == [240, 240, 28]
    assert not {result.data_ptr() for result in first} & {result.data_ptr() for result in second}


def test_a_graph_whose_change_is_refused_is_given_up():
    """A part of its launches may have been changed."""
    given = [torch.empty(1024, device="cuda") for _ in range(4)]
    tape = _C.LaunchTape(0, given[:1])
    tape.add_zeros(1, 0, 16)
    for index in (0, 0, 1, 2):
        tape.repeat([given[index]])
    assert tape.graphs == 3
    refuses("changes")
    assert counted(tape.repeat, [given[3]])["graph_launches"] == 0
    assert tape.graphs == 0


def test_where_there_is_no_room_for_another_graph_the_oldest_is_changed():
    """A process has room for two graphs of 12,000 launches."""
    memories = [torch.empty(1024, device="cuda") for _ in range(3)]
    tape = _C.LaunchTape(0, [memories[0]])
    for _ in range(12_000):
        tape.add_zeros(1, 0, 16)
    launched = [counted(tape.repeat, [memories[index]])["graph_launches"] for index in (0, 0, 1, 2, 0)]
    assert launched == [0, 1, 1, 1, 1]
    assert COUNTS.graphs == 2


def test_more_launches_than_all_graphs_may_have_go_one_by_one():
    memory = torch.empty(1024, device="cuda")
    tape = _C.LaunchTape(0, [memory])
    for _ in range(40_000):
        tape.add_zeros(1, 0, 16)
    for _ in range(3):
        assert counted(tape.repeat, [memory])["launches"] == 40_000
    assert tape.graphs == 0


def test_the_room_of_a_graph_goes_back_with_its_tape():
    memory = torch.empty(1024, device="cuda")
    for _ in range(4):
        tape = _C.LaunchTape(0, [memory])
        for _ in range(12_000):
            tape.add_zeros(1, 0, 16)
        assert [counted(tape.repeat, [memory])["graph_launches"] for _ in range(2)] == [0, 1]
        del tape


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream", "ignore:The CUDA Graph is empty")
def test_a_captured_step_has_every_launch(monkeypatch):
    """Of a layout that was met before, and of others: no graph makes way for them, which would spoil the capture."""
    training = Training()
    training.steps(8)
    monkeypatch.setattr(taped_layers, "MOST_TAPES", len(taped_layers._tapes))
    graphs = COUNTS.graphs
    assert graphs > 0
    batches = [torch.zeros(4, 3, size, size, device="cuda") for size in (64, 96, 96)]
    graph = torch.cuda.CUDAGraph()

    def capture():
        with torch.cuda.graph(graph), torch.autocast("cuda", torch.bfloat16):
            for images in batches:
                training.model(images.contiguous(memory_format=torch.channels_last)).sum().backward()
            assert graphs == COUNTS.graphs

    captured = counted(capture)
    assert captured["graph_launches"] == 0
    assert captured["launches"] > 0
    assert len(taped_layers._tapes) > taped_layers.MOST_TAPES
    training.step()
    assert len(taped_layers._tapes) == taped_layers.MOST_TAPES


def test_graphs_go_with_their_tapes():
    training = Training()
    training.steps(8)
    assert COUNTS.graphs >= 2 * STAGES
    taped_layers._tapes.clear()
    assert COUNTS.graphs == 0
