"""Times are taken in turn, memory is the slope of a fresh process's peak."""

from __future__ import annotations

import atexit
import mmap
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cases import needs_native
from torch import Tensor, nn

from densenet_efficient import kernels, measure
from densenet_efficient.measure import first_step_seconds, make_step, peak_memory, peak_memory_per_image, step_times

SHAPE = (3, 8, 8)


class KnownMemory(nn.Module):
    """A linear classifier that also fills `mib` MiB for each image while it runs."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.mib = mib
        self.linear = nn.Linear(192, 2)

    def forward(self, images: Tensor) -> Tensor:
        filled = torch.ones(len(images), self.mib * 2**18)
        return self.linear(images.flatten(1)) + filled[:, :2]


class KnownMemoryAndFile(KnownMemory):
    """Of a larger batch it also reads 32 MiB of a library, which stay mapped."""

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:
            with open(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "rb") as file:
                self.pages = mmap.mmap(file.fileno(), 2**25, access=mmap.ACCESS_READ)
            self.pages.find(b"no such bytes are there")
        return super().forward(images)


class Recorder(nn.Module):
    """A classifier that remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        self.logits = self.convolution(images).mean((2, 3))
        return self.logits


def test_steps_run_in_turn() -> None:
    order: list[str] = []
    times = step_times({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3
    assert list(times) == ["a", "b"]


def test_a_step_settles_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = 0.0, []

    def step(name: str) -> None:
        nonlocal clock
        clock += 0.2
        order.append(name)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    step_times({"a": lambda: step("a"), "b": lambda: step("b")}, rounds=1, warmup=0, settle=0.5)
    assert "".join(order) == "aaaabbbb"


def test_times_are_medians_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    def step(seconds: list[float]) -> None:
        nonlocal clock
        clock += seconds.pop(0)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock)
    a, b = [9.0, 1.0, 5.0, 2.0], [9.0, 0.25, 0.5, 8.0]
    assert step_times({"a": lambda: step(a), "b": lambda: step(b)}, rounds=3) == {"a": 2000.0, "b": 500.0}


@pytest.mark.parametrize(("rounds", "warmup"), [(0, 1), (1, -1)])
def test_step_times_needs_rounds(rounds: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=f"got rounds={rounds}, warmup={warmup}"):
        step_times({}, rounds, warmup)


def test_memory_is_what_an_image_adds() -> None:
    slope = peak_memory_per_image("test_measure:KnownMemory", {"mib": 8}, SHAPE, batches=(2, 12))
    assert slope == pytest.approx(8, rel=0.05)


def test_how_much_of_its_libraries_a_process_holds_adds_nothing() -> None:
    """Here the process of the larger batch has read a file of 32 MiB, as another may have read more of a library."""
    slope = peak_memory_per_image("test_measure:KnownMemoryAndFile", {"mib": 8}, SHAPE, batches=(2, 12))
    assert slope == pytest.approx(8, rel=0.05)


def test_memory_is_not_inherited_from_this_process() -> None:
    ballast = torch.ones(2**28)  # 1 GiB
    assert peak_memory("test_measure:KnownMemory", {"mib": 1}, SHAPE, 1) < ballast.nbytes


def test_a_failing_process_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.nn:Missing with batch 2 .* no attribute 'Missing'"):
        peak_memory("torch.nn:Missing", {}, SHAPE, 2)


def test_the_first_step_is_timed_with_the_start_of_its_process() -> None:
    start = time.perf_counter()
    seconds = first_step_seconds("test_measure:KnownMemory", {"mib": 1}, SHAPE, 2)
    assert 0.1 < seconds <= time.perf_counter() - start


def slow_to_end() -> nn.Module:
    atexit.register(time.sleep, 2)
    return KnownMemory(1)


def test_the_end_of_the_process_is_not_timed() -> None:
    start = time.perf_counter()
    seconds = first_step_seconds("test_measure:slow_to_end", {}, SHAPE, 2)
    assert seconds <= time.perf_counter() - start - 2


@pytest.mark.parametrize("batches", [(0, 4), (4, 4), (8, 4)])
def test_memory_needs_two_rising_batches(batches: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="0 < smaller < larger"):
        peak_memory_per_image("torch.nn:Identity", {}, SHAPE, batches)


def test_a_training_step_trains() -> None:
    model = Recorder().eval()
    before = model.convolution.weight.clone()
    loss = make_step(model, SHAPE, 2)()
    assert model.training
    assert loss.shape == ()
    assert not loss.requires_grad
    assert not torch.equal(model.convolution.weight, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.images.shape == (2, *SHAPE)
    assert model.images.is_contiguous(memory_format=torch.channels_last)


def test_an_inference_step_only_infers() -> None:
    model = Recorder()
    before = model.convolution.weight.clone()
    outputs = make_step(model, SHAPE, 2, task="infer", channels_last=False)()
    assert not model.training
    assert outputs.is_inference()
    assert torch.equal(model.convolution.weight, before)
    assert model.images.is_contiguous()


@pytest.mark.parametrize(
    ("dtype", "stored", "computed"),
    [
        ("float32", torch.float32, torch.float32),
        ("float64", torch.float64, torch.float64),
        ("bfloat16", torch.float32, torch.bfloat16),
    ],
)
def test_low_precision_is_autocast(dtype: str, stored: torch.dtype, computed: torch.dtype) -> None:
    model = Recorder()
    make_step(model, SHAPE, 2, dtype=dtype)()
    assert model.convolution.weight.dtype is stored
    assert model.logits.dtype is computed


@pytest.mark.parametrize(("option", "value"), [("task", "test"), ("dtype", "int8")])
def test_unknown_names_are_refused(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"unknown {option} '{value}'; expected one of"):
        make_step(nn.Identity(), SHAPE, 1, **{option: value})  # type: ignore[arg-type]


RESIDENT = """
import mmap, os, random, resource, torch
from densenet_efficient import return_freed_memory
from densenet_efficient.kernels import empty_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def fresh_pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def kept(mib):
    return empty_kept(torch.empty(0), mib * 2**18).fill_(mib)

"""


def measured(code: str) -> list[int]:
    """What ``code`` prints, in a process of its own, in which nothing else is kept."""
    process = subprocess.run([sys.executable, "-c", RESIDENT + code], capture_output=True, text=True, check=True)
    return [int(number) for number in process.stdout.split()]


RETURN_MEMORY = """
pairs = [(torch.ones(2**20), torch.ones(256)) for _ in range(64)]  # 4 MiB each, and something small that stays
small = [pair[1] for pair in pairs]
buffers = [kept(4) for _ in range(16)]
before = resident()
del pairs, buffers
held = before - resident()
return_freed_memory()
print(held >> 20, (before - resident()) >> 20)
"""


@needs_native
def test_freed_memory_goes_back_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and what the C library holds because small tensors lie between."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**25))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**40))
    held, returned = measured(RETURN_MEMORY)
    assert held < 32  # MiB
    assert returned > 64 + 0.8 * 256


RETURN_KERNEL_MEMORY = """
channels = 1024  # whose weight is transformed in 64 MiB
x, vector, weight = torch.rand(4, channels), torch.ones(channels), torch.rand(channels, channels, 3, 3)
torch.ops.densenet_efficient.bn_relu_conv3x3(x, vector, vector, weight, 2, 2, torch.empty_like(x), None, None)
held = resident()
return_freed_memory()
print((held - resident()) >> 20)
"""


@needs_native
def test_the_memory_of_kernels_goes_back_when_asked() -> None:
    (returned,) = measured(RETURN_KERNEL_MEMORY)
    assert returned > 48  # MiB


KEEP_MEMORY = """
first = kept(4)
address = first.data_ptr()
del first
again, other = kept(4), kept(4)
print(*(abs(values.data_ptr() - address) < mmap.PAGESIZE for values in (again, other)))
del again, other
small = [kept(4) for _ in range(16)]
before, pages = resident(), fresh_pages()
del small
middle = [kept(8) for _ in range(8)]
del middle
large = kept(64)
del large
parts = [kept(mib) for mib in (1, 32, 7, 24)]
print((resident() - before) >> 20, (fresh_pages() - pages) * os.sysconf("SC_PAGE_SIZE") >> 20)
"""


LIMITED_MEMORY = """
import resource
kept(1)
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (mapped + (600 << 20),) * 2)
first = kept(300)
del first
print(kept(400).numel())
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_kept_is_not_in_the_way_of_what_is_needed() -> None:
    """As under `ulimit -v`: there is room for one of them at a time."""
    process = subprocess.run([sys.executable, "-c", RESIDENT + LIMITED_MEMORY], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="pages move on Linux alone")
def test_memory_kept_for_the_next_step() -> None:
    """A buffer is taken again; of buffers of one size those of others are made, without a fresh page."""
    process = subprocess.run([sys.executable, "-c", RESIDENT + KEEP_MEMORY], capture_output=True, text=True, check=True)
    taken_again, taken_twice, grown, fresh = process.stdout.split()
    assert (taken_again, taken_twice) == ("True", "False")
    assert int(grown) <= 2 and int(fresh) <= 2  # MiB


REPEATED_STEPS = """
from densenet_efficient import EfficientDenseNet

model = EfficientDenseNet(block_config=(6, 8, 4), num_classes=10, checkpointing="none")
images = torch.rand(4, 3, 128, 128)

def mappings_after(steps):
    for _ in range(steps):
        model.zero_grad()
        model(images).sum().backward()
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)

print(mappings_after(5), mappings_after(40))
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_repeated_steps_do_not_scatter_the_memory() -> None:
    """Each range of pages that are moved apart costs a call of the system whenever it moves again."""
    first, later = measured(REPEATED_STEPS)
    assert later <= first + 8


MIXED_MEMORY = """
return_freed_memory()
random.seed(0)
before, in_use, most, grown, buffers = resident(), 0, 0, 0, []
for step in range(3000):
    if buffers and random.random() < 0.5:
        values, filled_with = buffers.pop(random.randrange(len(buffers)))
        assert values.min() == values.max() == filled_with
        in_use -= values.nbytes
        del values
    else:
        values = empty_kept(torch.empty(0), random.choice((2**16, 10**5, 3 * 10**5, 2**20, 2**22))).fill_(step)
        buffers.append((values, step))
        in_use += values.nbytes
        del values
    most = max(most, in_use)
    grown = max(grown, resident() - before)
print(most >> 20, grown >> 20)
"""


@needs_native
def test_buffers_of_many_sizes_hold_their_own_values() -> None:
    """And the process holds no more than was in use at once, but for whole pages and 2 MiB."""
    most, grown = measured(MIXED_MEMORY)
    assert grown <= 1.03 * most + 4  # MiB


TOO_MANY_RANGES = """
buffers = [kept(4) for _ in range(4)]
del buffers[::2]  # no two that are adjacent
maps = []
try:
    while True:
        maps.append(mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE * (len(maps) % 2)))
except OSError:
    del maps[-3:]
values = kept(8)
del maps
print(int((values == 8).all()), int(all((other == 4).all() for other in buffers)), int((kept(8) == 8).all()))
"""


@needs_native
@pytest.mark.skipif(sys.platform != "linux", reason="pages move on Linux alone")
def test_where_the_system_moves_no_more_pages_torch_allocates() -> None:
    assert measured(TOO_MANY_RANGES) == [1, 1, 1]


@needs_native
@pytest.mark.parametrize("size", [(0, 7), (3,), (2, 2**22), (2, 2**24)], ids=str)
def test_empty_kept_is_an_ordinary_tensor(size: tuple[int, ...]) -> None:
    tensor = kernels.empty_kept(torch.empty(1, dtype=torch.bfloat16), *size)
    assert tensor.shape == size and tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
    assert torch.equal(tensor.fill_(2).clone(), torch.full(size, 2, dtype=torch.bfloat16))


def test_empty_kept_of_another_device() -> None:
    tensor = kernels.empty_kept(torch.empty(1, dtype=torch.bfloat16, device="meta"), 2, 3)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((2, 3), torch.bfloat16, "meta")
