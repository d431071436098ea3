"""What the launchers of the Triton kernels decide from a tensor's device and dtype; no GPU needed."""

from types import SimpleNamespace

import pytest
import torch

from densenet_efficient.kernels.triton import launch


@pytest.mark.parametrize(
    ("dtype", "allows_tf32", "precision"),
    [
        (torch.float32, True, "tf32"),
        (torch.float32, False, "ieee"),
        (torch.float64, True, "ieee"),
        (torch.bfloat16, True, "ieee"),
    ],
    ids=str,
)
def test_float32_is_rounded_to_tf32_where_convolutions_may(dtype, allows_tf32, precision, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allows_tf32)
    assert launch.dot_precision(dtype) == precision


@pytest.mark.parametrize(("index", "entered"), [(0, []), (1, [torch.device("cuda", 1)])])
def test_the_device_of_a_tensor_becomes_the_current_one(index, entered, monkeypatch):
    devices = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            devices.append(self.device)

        def __exit__(self, *exception):
            pass

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Device)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index), get_device=lambda: index)
    with launch.on_device(tensor):
        assert devices == entered


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), False)])
def test_hopper_alone_has_products_of_warp_groups(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.has_warpgroup_products.__wrapped__(torch.device("cuda", 0)) == has


def test_listeners_are_told_in_turn():
    """The one within another alone, and the other again behind it."""

    class Listener:
        def __init__(self):
            self.heard = []

        def launched(self, compiled, blocks, arguments):
            self.heard.append((compiled, blocks, arguments))

    def function(*arguments, **options):
        assert options == {"enable_fp_fusion": True}
        return "compiled"

    kernel = launch.Kernel({(2, 3): function})
    outer, inner = Listener(), Listener()
    kernel[2, 3](1)
    with launch.listening(outer):
        with launch.listening(inner):
            kernel[2, 3](2)
        kernel[2, 3](3)
    kernel[2, 3](4)
    assert outer.heard == [("compiled", (2, 3), (3,))]
    assert inner.heard == [("compiled", (2, 3), (2,))]
