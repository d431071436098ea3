"""Which backend serves a GPU, and what is said where none or not the one asked for can; no GPU needed."""

import sys
from types import ModuleType

import pytest
import torch
from cases import make_images, make_pair, needs_native

from densenet_efficient import inference, kernels
from densenet_efficient.kernels import BACKEND_VARIABLE, cpu, cuda, gpu

TRITON = "densenet_efficient.kernels.triton"
GPU = torch.device("cuda", 0)


class Machine:
    """A machine with a card, Triton and a native build with CUDA, of which each can be taken away."""

    def __init__(self, monkeypatch):
        self.set = monkeypatch.setattr
        self.modules = monkeypatch
        self.set(torch.cuda, "is_available", lambda: True)
        self.set(torch.cuda, "get_device_name", lambda device: "a card")
        self.set(torch.version, "hip", None)
        self.set(cpu, "_unavailable_reason", None)
        self.card(9, 0)
        self.build("8.0;9.0+PTX")
        self.modules.setitem(sys.modules, TRITON, ModuleType(TRITON))

    def card(self, *capability):
        self.set(torch.cuda, "get_device_capability", lambda device: capability)

    def build(self, architectures, why_not=None):
        extension = ModuleType("densenet_efficient._C")
        extension.build_info = lambda: {"cuda_architectures": architectures, "why_not_cuda": why_not}
        self.modules.setitem(sys.modules, "densenet_efficient._C", extension)
        self.modules.setattr("densenet_efficient._C", extension, raising=False)

    def without_triton(self):
        self.modules.setitem(sys.modules, TRITON, None)  # its import raises ImportError


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_announced", set())
    monkeypatch.setattr(kernels, "BACKENDS", dict(kernels.BACKENDS))
    cached = [gpu.unsupported_card, gpu.missing_triton, cuda._missing_operators]
    for function in cached:
        function.cache_clear()
    yield Machine(monkeypatch)
    for function in cached:
        function.cache_clear()


def test_the_best_of_a_complete_machine(machine):
    assert kernels.backend_name(GPU) == "cuda"
    assert kernels.backend_for(GPU) is cuda


def test_triton_where_the_extension_has_no_cuda(machine, recwarn):
    machine.build(None, why_not="nvcc was not found")
    assert kernels.backend_name(GPU) == "triton"
    assert kernels.backend_for(GPU) is sys.modules[TRITON]
    assert not recwarn.list


def test_triton_where_the_extension_has_no_code_for_the_card(machine):
    machine.build("9.0")
    machine.card(8, 6)
    assert kernels.backend_name(GPU) == "triton"


def test_an_old_card_is_announced_once(machine):
    machine.card(7, 5)
    with pytest.warns(
        RuntimeWarning, match=r"a card has compute capability 7\.5, below 8\.0\. Remedy: a card"
    ) as warned:
        assert [kernels.backend_name(GPU) for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1


def test_a_card_of_another_maker_is_announced_once(machine):
    """Its compute capability is above what is asked for."""
    machine.set(torch.version, "hip", "7.0")
    machine.card(9, 4)
    with pytest.warns(RuntimeWarning, match="made for NVIDIA's cards.*AMD's.*Remedy: a card of NVIDIA's") as warned:
        assert [kernels.backend_name(GPU) for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1


def test_a_missing_triton_is_announced_once(machine):
    machine.without_triton()
    with pytest.warns(RuntimeWarning, match=r"Triton kernels could not be imported.*Remedy: pip install") as warned:
        assert [kernels.backend_name(GPU) for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_a_device_without_a_backend_of_its_own_is_announced_once(machine, device):
    with pytest.warns(RuntimeWarning, match=f"slower plain-torch backend: no other serves {device}") as warned:
        assert [kernels.backend_name(device) for _ in range(3)] == ["reference"] * 3
    assert len(warned) == 1


def test_where_nothing_is_computed_nothing_is_slow(machine, recwarn):
    assert kernels.backend_name("meta") == "reference"
    assert not recwarn.list


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_requested_backend_works_or_raises(machine, monkeypatch, name):
    monkeypatch.setenv(BACKEND_VARIABLE, name)
    assert kernels.backend_name(GPU) == name
    with pytest.raises(RuntimeError, match=f"{name} cannot serve a tensor on cpu.*Remedy: unset {BACKEND_VARIABLE}"):
        kernels.backend_name("cpu")
    machine.card(7, 0)
    gpu.unsupported_card.cache_clear()
    with pytest.raises(RuntimeError, match=rf"{name} cannot serve a tensor on cuda:0: a card has .* 7\.0"):
        kernels.backend_name(GPU)
    machine.card(8, 0)
    gpu.unsupported_card.cache_clear()
    machine.without_triton()
    gpu.missing_triton.cache_clear()
    with pytest.raises(RuntimeError, match="could not be imported"):
        kernels.backend_name(GPU)


def test_cuda_requested_of_a_build_without_it(machine, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    machine.build(None, why_not="nvcc was not found: install the CUDA toolkit")
    with pytest.raises(RuntimeError, match="built without CUDA: nvcc was not found: install"):
        kernels.backend_name(GPU)
    machine.build("8.0")
    cuda._missing_operators.cache_clear()
    with pytest.raises(RuntimeError, match=r"architectures 8\.0, this card is 9\.0\. Remedy: .*LIST=9\.0"):
        kernels.backend_name(GPU)
    machine.set(cpu, "_unavailable_reason", "it was not built")
    cuda._missing_operators.cache_clear()
    with pytest.raises(RuntimeError, match="it was not built"):
        kernels.backend_name(GPU)


def test_a_torch_that_sees_no_gpu(machine, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "cuda")
    machine.set(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"sees no GPU\. Remedy: install a (card|CUDA build)"):
        kernels.backend_name(GPU)


def test_the_cpu_backend_serves_no_gpu(machine, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "cpu")
    with pytest.raises(RuntimeError, match="cpu cannot serve a tensor on cuda:0: cpu serves the CPU alone"):
        kernels.backend_name(GPU)


def test_the_interpreter_serves_the_cpu(machine, monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.backend_name("cpu") == "triton"


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        ("8.0;9.0+PTX", (8, 0), True),
        ("8.0;9.0+PTX", (8, 9), True),
        ("8.0;9.0+PTX", (9, 0), True),
        ("8.0;9.0+PTX", (12, 0), True),
        ("8.0 9.0", (10, 0), False),
        ("8.6", (8, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
        ("9.0a;9.0+PTX", (10, 0), True),
        ("8.0+PTX", (9, 0), True),
        ("9.0+PTX", (8, 0), False),
    ],
)
def test_which_cards_a_build_serves(architectures, capability, served):
    assert cuda.serves(architectures, capability) is served


def test_every_operation_of_the_contract_has_its_place():
    assert set(cuda.NATIVE) == {name for name in kernels.CONTRACT if "conv" not in name}
    with pytest.raises(AttributeError, match="bn_relu_conv7x7"):
        getattr(cuda, "bn_relu_conv7x7")  # noqa: B009


def test_a_native_extension_that_is_missing_or_of_another_torch(machine, monkeypatch):
    machine.build(None)
    sys.modules["densenet_efficient._C"].build_info = lambda: {"torch": "1.2.3"}
    assert "was built for torch 1.2, this is torch" in cpu._why_unavailable()
    monkeypatch.delattr("densenet_efficient._C")
    monkeypatch.setitem(sys.modules, "densenet_efficient._C", None)
    assert "densenet_efficient._C could not be imported" in cpu._why_unavailable()


@needs_native
def test_capabilities_end_with_the_one_in_use():
    from densenet_efficient import _C

    assert cpu.capabilities()[-1] == _C.cpu_capability()


@needs_native
def test_operations_of_the_cuda_backend_are_native_or_triton_s(machine, monkeypatch):
    convolution = next(name for name in kernels.CONTRACT if name not in cuda.NATIVE)
    for name in (cuda.NATIVE[0], convolution):
        monkeypatch.delitem(vars(cuda), name, raising=False)
    monkeypatch.setattr(sys.modules[TRITON], convolution, "the Triton kernel", raising=False)
    assert getattr(cuda, convolution) == "the Triton kernel"
    assert getattr(cuda, cuda.NATIVE[0]) is getattr(torch.ops.densenet_efficient, cuda.NATIVE[0]).default
    for name in (cuda.NATIVE[0], convolution):
        del vars(cuda)[name]


def test_an_inference_runs_on_the_backend_that_is_asked_for(monkeypatch):
    """What is prepared is the native one's."""
    monkeypatch.setenv(BACKEND_VARIABLE, "reference")
    for prepared in ("prepare_stage", "run_stem"):
        monkeypatch.setattr(inference, prepared, lambda *_: pytest.fail("the native backend ran"))
    naive, efficient = make_pair(mode="eval")
    images = make_images(2, 3, 33, 47)
    with torch.inference_mode():
        torch.testing.assert_close(efficient(images), naive(images), rtol=1e-9, atol=1e-9)
