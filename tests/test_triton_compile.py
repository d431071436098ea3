"""Every Triton kernel compiled ahead of time for Ampere and Hopper, as the launchers launch it for DenseNets.

A launch on tensors without memory compiles what a launch on a card would, and no more. What ptxas says of the result is
held to what makes a kernel fast: no register spilled to memory, and on Hopper the products of warp groups.
"""

import re
import subprocess

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from densenet_efficient.kernels import accumulation_dtype
from densenet_efficient.kernels import triton as backend
from densenet_efficient.kernels.triton import launch

# images, height = width, channels, bottleneck channels, growth rate: a batch of 256 at the first and at the last layer.
LAYERS = [(256, 56, 64, 128, 32), (256, 7, 1888, 128, 32)]
DENSENET161 = (256, 14, 1056, 192, 48)
STORAGE = 2048  # channels of the storage whose slots the matrices are


class Compiler:
    """In place of a card's driver: says what to compile for, and cannot launch."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_device(self):
        return f"sm_{self.architecture}"  # kernels are kept by device, so these stay apart from those of a card

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)


@pytest.fixture(params=[80, 90], ids=lambda architecture: f"sm_{architecture}")
def architecture(request, monkeypatch):
    monkeypatch.setattr(driver, "_active", Compiler(request.param))
    monkeypatch.setattr(launch, "INTERPRETED_CAPABILITY", request.param // 10)
    launch.has_warpgroup_products.cache_clear()
    yield request.param
    launch.has_warpgroup_products.cache_clear()


@pytest.fixture
def compiled(monkeypatch):
    """What the launches compile from here on: each kernel under the name of its operation and its own."""
    kernels = {}
    run = JITFunction.run

    def compile_only(self, *arguments, grid, warmup, **options):
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        operation = self.fn.__module__.rpartition(".")[2]
        kernels[kernel.hash] = (f"{operation}.{self.fn.__name__}", kernel)

    monkeypatch.setattr(JITFunction, "run", compile_only)
    return kernels


class Layer:
    """The launches of one layer, of tensors without memory."""

    def __init__(self, dtype, images, size, channels, bottleneck, growth_rate):
        self.dtype, self.images, self.rows, self.size = dtype, images, images * size * size, (size, size)
        self.channels, self.bottleneck, self.growth_rate = channels, bottleneck, growth_rate

    def slot(self, channels, rows=None):
        return torch.empty(rows or self.rows, STORAGE, dtype=self.dtype, device="meta")[:, :channels]

    def vectors(self, channels, number):
        return torch.empty(number, channels, dtype=accumulation_dtype(self.dtype), device="meta").unbind()

    def weight(self, outputs, channels, kernel):
        return torch.empty(outputs, channels, kernel, kernel, device="meta")

    def convolutions(self):
        x, grad, out = self.slot(self.channels), self.slot(self.channels), self.slot(self.bottleneck)
        weight = self.weight(self.bottleneck, self.channels, 1)
        mean, scale, shift, *sums = self.vectors(self.channels, 5)
        finish = self.vectors(self.bottleneck, 3)
        backend.bn_relu_conv1x1(x, scale, shift, weight, out, *self.vectors(self.bottleneck, 2))
        backend.bn_relu_conv1x1(x, scale, shift, weight, out, None, None)
        backend.bn_relu_conv1x1_backward(out, out, *finish, x, mean, scale, shift, weight, grad, weight, *sums)
        backend.bn_relu_conv1x1_backward(out, out, *finish, x, mean, scale, shift, weight, grad, None, *sums)

        x, grad, out = self.slot(self.bottleneck), self.slot(self.bottleneck), self.slot(self.growth_rate)
        weight = self.weight(self.growth_rate, self.bottleneck, 3)
        mean, scale, shift, *sums = self.vectors(self.bottleneck, 5)
        statistics = self.vectors(self.growth_rate, 2)
        backend.bn_relu_conv3x3(x, scale, shift, weight, *self.size, out, *statistics)
        backend.bn_relu_conv3x3_backward(out, x, mean, scale, shift, weight, *self.size, grad, False, weight, *sums)

    def plain_convolution(self):
        """Without a bottleneck: on the storage itself, adding into its gradient."""
        x, grad, out = self.slot(self.channels), self.slot(self.channels), self.slot(self.growth_rate)
        weight = self.weight(self.growth_rate, self.channels, 3)
        mean, scale, shift, *sums = self.vectors(self.channels, 5)
        statistics = self.vectors(self.growth_rate, 2)
        backend.bn_relu_conv3x3(x, scale, shift, weight, *self.size, out, *statistics)
        backend.bn_relu_conv3x3_backward(out, x, mean, scale, shift, weight, *self.size, grad, True, weight, *sums)

    def others(self):
        x, grad = self.slot(self.channels), self.slot(self.channels)
        pooled = self.slot(self.channels, self.rows // 4)
        mean, variance, scale, shift, *sums = self.vectors(self.channels, 6)
        affine = torch.empty(4, self.channels, device="meta")
        backend.batch_norm_affine(mean, variance, scale, shift, 1e-5, affine)
        backend.batch_norm_gradients(*sums, scale, scale, self.rows, mean, scale, shift)
        backend.channel_stats(x, mean, variance)
        images = torch.empty(self.images, self.size[0] * self.size[1], self.channels, dtype=self.dtype, device="meta")
        backend.write_with_statistics(images.transpose(1, 2), x, mean, variance)  # channels-last
        backend.write_with_statistics(images.view(self.images, self.channels, -1), x, mean, variance)  # contiguous
        backend.project_gradient(grad, x, mean, scale, shift)
        backend.bn_relu_avg_pool(x, scale, shift, *self.size, 2, 2, pooled)
        backend.bn_relu_avg_pool_backward(pooled, x, mean, scale, shift, *self.size, 2, 2, grad, True, *sums)
        backend.bn_relu_max_pool(x, scale, shift, *self.size, pooled)
        backend.bn_relu_max_pool_backward(pooled, x, mean, scale, shift, *self.size, grad, *sums)


def spilled_bytes(kernel, architecture, directory):
    """What the ptxas that Triton takes for the architecture reports of the kernel's PTX."""
    source = directory / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    target = f"sm_{architecture}a" if architecture >= 90 else f"sm_{architecture}"
    command = [get_ptxas(architecture).path, "-v", "--gpu-name", target, str(source), "-o", str(directory / "cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill", report)
    assert spills, report
    return sum(map(int, spills))


def assert_fast(compiled, architecture, directory):
    assert compiled
    for name, kernel in compiled.values():
        assert not spilled_bytes(kernel, architecture, directory), f"{name} spills registers"
        assert kernel.metadata.enable_fp_fusion, f"{name} multiplies and adds apart"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_convolutions_multiply_in_tensor_cores_and_spill_no_registers(dtype, architecture, compiled, tmp_path):
    for layer in LAYERS if dtype == torch.bfloat16 else LAYERS[1:]:
        Layer(dtype, *layer).convolutions()
    assert_fast(compiled, architecture, tmp_path)
    instruction = "wgmma.mma_async" if architecture == 90 else "mma.sync"
    for name, kernel in compiled.values():
        if "conv" in name:
            assert instruction in kernel.asm["ptx"], f"{name} does not use {instruction}"


@pytest.mark.parametrize(("dtype", "layer"), [(torch.float16, LAYERS[1]), (torch.bfloat16, DENSENET161)], ids=str)
@pytest.mark.parametrize("architecture", [90], indirect=True)
def test_float16_and_wider_layers_spill_no_registers(dtype, layer, architecture, compiled, tmp_path):
    Layer(dtype, *layer).convolutions()
    assert_fast(compiled, architecture, tmp_path)


@pytest.mark.parametrize(
    ("growth_rate", "dtype"),
    [(12, torch.float64), (24, torch.bfloat16), (40, torch.bfloat16)],
    ids=str,
)
def test_plain_layers_spill_no_registers(growth_rate, dtype, architecture, compiled, tmp_path):
    for images in (32, 256):  # few rows and many
        Layer(dtype, images, 32, 16 + 20 * growth_rate, 0, growth_rate).plain_convolution()
    assert_fast(compiled, architecture, tmp_path)


def test_exact_float32_spills_no_registers(architecture, compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    Layer(torch.float32, *LAYERS[1]).convolutions()
    assert_fast(compiled, architecture, tmp_path)


def test_other_operations_spill_no_registers(architecture, compiled, tmp_path):
    for dtype in [torch.bfloat16] if architecture == 90 else [torch.bfloat16, torch.float32]:
        Layer(dtype, *LAYERS[0]).others()
    assert_fast(compiled, architecture, tmp_path)


def test_few_channels_compile(architecture, compiled):
    """Tensor cores multiply sixteen by sixteen at least."""
    for dtype in (torch.bfloat16, torch.float32):
        Layer(dtype, 2, 8, 6, 4, 2).convolutions()
    assert len(compiled) > 10


def test_a_layer_more_compiles_nothing_new(architecture, compiled):
    """The channels grow from layer to layer: they are arguments, not constants of the kernels."""
    Layer(torch.bfloat16, 256, 14, 512, 128, 32).convolutions()
    Layer(torch.bfloat16, 256, 14, 512, 128, 32).plain_convolution()
    number = len(compiled)
    for channels in range(544, 1792, 32):
        Layer(torch.bfloat16, 256, 14, channels, 128, 32).convolutions()
        Layer(torch.bfloat16, 256, 14, channels, 128, 32).plain_convolution()
    assert len(compiled) == number


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_no_batch_is_too_large_for_a_grid(dtype, monkeypatch):
    """Along its second and third axis a grid has at most 65,535 programs, along the first 2^31 - 1."""
    grids = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *_, grid, **__: grids.append((self.fn.__name__, *grid)))
    layer = Layer(dtype, 2**31 // 112**2 - 1, 112, 256, 128, 32)  # pixels are counted in 32 bits
    layer.convolutions()
    layer.plain_convolution()
    layer.others()
    assert len({name for name, *_ in grids}) > 10
    for name, first, *others in grids:
        assert first < 2**31, name
        assert max(others, default=1) < 2**16, name
