"""Training on a GPU: CUDA graphs, streams, mixed precision, no waiting for the device, a memory that is full."""

import contextlib
import functools
from collections import OrderedDict
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import GPU_BACKENDS, LEVELS, assert_close, make_images, make_pair, needs_gpu, step
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from densenet_efficient import EfficientDenseNet, kernels, synchronisation, taped_layers

pytestmark = needs_gpu
every_level = pytest.mark.parametrize("level", LEVELS)
MODEL = {"growth_rate": 16, "block_config": (3, 2), "num_init_features": 32, "bn_size": 4, "num_classes": 10}


@pytest.fixture(params=GPU_BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


class Training:
    """A small network and one batch of it, whose step may be captured."""

    def __init__(self, level, dtype=torch.bfloat16, device="cuda"):
        torch.manual_seed(0)
        self.model = EfficientDenseNet(**MODEL, checkpointing=level).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.dtype, self.device = dtype, torch.device(device)
        images = make_images(4, 3, 64, 64, dtype=torch.float32)
        self.images = images.to(device, memory_format=torch.channels_last)
        self.labels = torch.arange(4, device=device)

    def loss(self):
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            return F.cross_entropy(self.model(self.images), self.labels)

    def step(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss

    def state(self):
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def assert_same_bits(actual, expected):
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@every_level
def test_offloaded_storages_give_the_same_bits(backend, level):
    here, away = Training(level), Training(level)
    for block in (away.model.features.denseblock1, away.model.features.denseblock2):
        block.offload = True
    for _ in range(3):
        here.step()
        away.step()
    assert_same_bits(away.state(), here.state())


def test_an_offloaded_storage_leaves_the_gpu(backend):
    held = []
    for offload in (False, True):
        training = Training("bottleneck")
        training.model.features.denseblock1.offload = offload
        training.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = training.loss()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del loss
    storage = 4 * 16 * 16 * (32 + 3 * 16) * 2
    assert held[1] <= held[0] - storage


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_results_are_those_of_the_cpu(backend, monkeypatch, level, dtype):
    results = []
    for device, name in (("cpu", "cpu"), ("cuda", backend)):
        monkeypatch.setenv(kernels.BACKEND_VARIABLE, name)
        model = make_pair(dtype=dtype, checkpointing=level)[1].to(device)
        found = step(model, make_images(2, 3, 33, 47, dtype=dtype).to(device))
        results.append({name: value.cpu() for name, value in found.items()})
    assert_close(results[1], results[0], 1e-9 if dtype == torch.float64 else 1e-2)


@every_level
def test_the_same_bits_in_every_run(backend, level):
    runs = []
    for _ in range(2):
        training = Training(level)
        for _ in range(3):
            training.step()
        runs.append(training.state())
    assert_same_bits(*runs)


@every_level
@pytest.mark.skipif(kernels.cuda.architectures() is None, reason="the native extension has no CUDA operators")
def test_repeated_launches_have_the_bits_of_the_loop(monkeypatch, level):
    """Triton's kernels alone, since a repetition knows no others; in training, then in evaluation."""
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "triton")
    monkeypatch.setattr(taped_layers, "_tapes", OrderedDict())
    states = []
    for can_run in (taped_layers.can_run, lambda *_: False):
        monkeypatch.setattr(taped_layers, "can_run", can_run)
        training, kept = Training(level), []
        for index in range(12):
            training.step()
            if index % 3 == 2:  # so that a step finds its memory elsewhere
                kept += [parameter.grad for parameter in training.model.parameters()]
        training.model.eval()
        for _ in range(4):
            loss = training.loss().detach()
        states.append(training.state() | {"loss": loss})
    assert_same_bits(*states)
    assert len(taped_layers._tapes) == 3 * len(MODEL["block_config"])
    assert all(tape is not None and tape.native is not None for tape in taped_layers._tapes.values())
    assert all(tape.native.graphs > 0 for tape in taped_layers._tapes.values())


@pytest.mark.large
@every_level
def test_more_pixels_than_a_grid_has_programs_along_an_axis(backend, level):
    """4.2 million rows in the first block, 64 to a program: more than 65,535 of them."""
    training = Training(level)
    images = torch.randn(1400, 3, 224, 224, device="cuda").to(memory_format=torch.channels_last)
    training.images, training.labels = images, torch.arange(len(images), device="cuda") % MODEL["num_classes"]
    for _ in range(3):
        assert training.step().isfinite()
    training.model.eval()
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(training.model(images), torch.cat([training.model(half) for half in images.split(700)]))


@every_level
def test_a_step_never_waits_for_the_device(backend, level):
    training = Training(level)
    training.step()  # compiles, and asks for the properties of the card
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
        training.model.eval()
        with torch.inference_mode():
            training.loss()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_level
def test_a_whole_step_in_a_graph(backend, level):
    eager, captured = Training(level), Training(level)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    captured.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(2):
        graph.replay()
    for _ in range(5):
        eager.step()
    assert_same_bits(captured.state(), eager.state())


@every_level
def test_make_graphed_callables(backend, level):
    eager, captured = Training(level, torch.float32), Training(level, torch.float32)
    before = captured.state()
    graphed = torch.cuda.make_graphed_callables(captured.model, (captured.images.clone(),))
    captured.model.load_state_dict(before)  # the warm-up has run the norms' statistics on
    captured.model = graphed
    for training in (eager, captured):
        for _ in range(2):
            training.step()
    actual, expected = captured.state(), eager.state()
    cancels = "features.norm0.bias"  # 2e-5 on an H200, where its gradient cancels; all else is within 1e-6
    assert_close({cancels: actual.pop(cancels)}, {cancels: expected.pop(cancels)}, 1e-4)
    assert_close(actual, expected, 1e-6)


@pytest.fixture
def nccl(tmp_path):
    """The name of NCCL's group of one process: one card serves no more."""
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


@every_level
def test_statistics_and_gradients_that_go_through_nccl(backend, level, nccl, monkeypatch):
    """Alone a process would exchange nothing; here it does, and trains as it does alone."""
    gather, reduce = (MagicMock(wraps=getattr(synchronisation, name)) for name in ("all_gather", "all_reduce"))
    monkeypatch.setattr(synchronisation, "all_gather", gather)
    monkeypatch.setattr(synchronisation, "all_reduce", reduce)
    alone, synchronised = Training(level, torch.float32), Training(level, torch.float32)
    monkeypatch.setattr(synchronisation, "group_of", lambda norm: nccl if isinstance(norm, nn.SyncBatchNorm) else "")
    nn.SyncBatchNorm.convert_sync_batchnorm(synchronised.model)
    network = synchronised.model
    synchronised.model = DistributedDataParallel(network, device_ids=[0])
    for training in (alone, synchronised):
        for _ in range(2):
            training.step()
    assert gather.called and reduce.called
    assert_close(network.state_dict(), alone.state(), 1e-4)


@every_level
def test_gradients_are_scaled(backend, level):
    training = Training(level, torch.float16)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    before = training.state()
    for _ in range(3):
        training.optimizer.zero_grad(set_to_none=True)
        scaler.scale(training.loss()).backward()
        scaler.step(training.optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**8  # no step was skipped
    changed = [name for name, value in training.state().items() if not torch.equal(value, before[name])]
    assert {name for name, _ in training.model.named_parameters()} <= set(changed)
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())


@every_level
def test_another_stream(backend, level):
    expected, training = Training(level), Training(level)
    expected.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        training.step()
    stream.synchronize()
    assert_same_bits(training.state(), expected.state())


@every_level
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(backend, level):
    expected, training = Training(level), Training(level, device="cuda:1")
    expected.step()
    training.step()
    assert torch.cuda.current_device() == 0
    moved = {name: value.to("cuda:0") for name, value in training.state().items()}
    assert_same_bits(moved, expected.state())


def test_mixed_devices_are_refused(backend):
    training = Training("bottleneck")
    with pytest.raises(RuntimeError, match=r"same device|same type|cpu"):
        training.model(training.images.cpu())


@every_level
@pytest.mark.parametrize("during", ["forward", "backward"])
def test_a_full_memory_leaves_everything_usable(backend, level, during):
    """What cannot be allocated raises torch's own error; a smaller batch then trains as if nothing had been."""
    expected, training = Training(level), Training(level)
    expected.step()
    images = torch.randn(64, 3, 128, 128, device="cuda")
    before = training.state()
    attempt = functools.partial(training.model, images)
    if during == "backward":
        attempt = attempt().sum().backward
    torch.cuda.empty_cache()
    with room(2**20), pytest.raises(torch.OutOfMemoryError):
        attempt()
    del attempt
    training.model.load_state_dict(before)  # the forward of a backward that failed has moved the running statistics
    training.step()
    assert_same_bits(training.state(), expected.state())


@every_level
def test_a_memory_that_is_full_at_any_point(backend, level):
    """From no room at all to enough for a step: each norm is updated once or not at all, and then a small batch trains.

    The room grows by a few MiB at a time, much less than the large tensors, so the step fails in each of its phases.
    """
    training, images = Training(level), torch.randn(128, 3, 128, 128, device="cuda")
    norms = {name: module for name, module in training.model.named_modules() if hasattr(module, "running_mean")}
    training.step()  # compiles
    before = training.state()
    failures = 0
    for mebibytes in range(0, 2048, 4):
        training.model.load_state_dict(before)
        training.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        try:
            with room(mebibytes * 2**20), torch.autocast("cuda", torch.bfloat16):
                training.model(images).sum().backward()
        except torch.OutOfMemoryError:
            failures += 1
        else:
            break
        for name, norm in norms.items():
            counted = norm.num_batches_tracked != before[f"{name}.num_batches_tracked"]
            assert counted == (norm.running_mean != before[f"{name}.running_mean"]).any(), name
            assert counted == (norm.running_var != before[f"{name}.running_var"]).any(), name
        assert training.step().isfinite()
    else:
        raise AssertionError("the step fitted into no memory")
    assert failures > 3


@contextlib.contextmanager
def room(size):
    """Lets this process take ``size`` bytes more of the card than it holds now."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.large
@every_level
def test_larger_storages_than_32_bits_can_count(backend, level):
    """More than 2^31 elements in a block's storage: each image comes out as it does alone."""
    arguments = {"growth_rate": 8, "block_config": (2,), "num_init_features": 64, "bn_size": 2, "num_classes": 4}
    model = EfficientDenseNet(**arguments, checkpointing=level, small_inputs=True).to("cuda").eval()
    halves = torch.randn(2, 1, 3, 3700, 3700, device="cuda", dtype=torch.bfloat16)
    assert 2 * 3700 * 3700 * (64 + 16) > 2**31
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        together = model(halves.flatten(0, 1))
        alone = torch.cat([model(half) for half in halves])
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-2)


def test_the_default_backend_of_this_machine():
    assert kernels.backend_name("cuda") == "cuda"
