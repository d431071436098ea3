"""The cases of the kernels: random arguments of each operation of the contract, laid out as a dense block has them."""

import ctypes
import math
import mmap
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from densenet_efficient.kernels import CONTRACT, accumulation_dtype, reference

BOUNDARY = 3.0  # stands around every slot, and must stand there afterwards
# What storing a result costs in 16 bits; in float32, what another order of summation costs where terms cancel.
FLOORS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SCRATCH = {"bn_relu_conv1x1_backward": ("out_grad",)}  # arguments that an operation may leave changed
# The operations on matrices of rows; the other ones compute with vectors of channels only.
OVER_ROWS = [name for name in CONTRACT if not name.startswith("batch_norm")]
UNNEEDED = [  # results of an operation that may be None, together
    ("bn_relu_conv1x1", ["mean", "variance"]),
    ("bn_relu_conv3x3", ["mean", "variance"]),
    *(
        (operation, unneeded)
        for operation in ("bn_relu_conv1x1_backward", "bn_relu_conv3x3_backward")
        for unneeded in (["grad"], ["grad_weight"], ["grad", "grad_weight"], ["grad", "sum_grad", "sum_grad_x"])
    ),
    ("bn_relu_avg_pool_backward", ["grad"]),
    ("batch_norm_gradients", ["grad_weight"]),
    ("batch_norm_gradients", ["slope", "offset"]),
]


# Of images [N, C, P]; the cut ones lie in larger ones, with gaps between images, between pixels and at last everywhere.
LAYOUTS = {
    "channels-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels-last, cut": lambda x: F.pad(x.transpose(1, 2), (1, 2, 2, 1)).transpose(1, 2)[:, 1:-2, 2:-1],
    "contiguous": torch.Tensor.contiguous,
    "contiguous, cut": lambda x: F.pad(x, (1, 2, 2, 1))[:, 2:-1, 1:-2],
    "neither": lambda x: x.repeat_interleave(3, 2).repeat_interleave(2, 1)[:, ::2, ::3],
}


class Case(NamedTuple):
    """One call: its arguments by name, matrices [M, C] and vectors in float64."""

    operation: str
    arguments: dict[str, Any]
    written: dict[str, bool]  # what the operation writes: whether it adds to what is there

    def without(self, *names: str) -> "Case":
        """The same with these results not asked for."""
        return self._replace(
            arguments=self.arguments | dict.fromkeys(names),
            written={name: adds for name, adds in self.written.items() if name not in names},
        )


class Factory:
    """Random arguments of one geometry. Pre-activations keep away from zero, so that no ReLU flips in any dtype."""

    def __init__(self, images, height, width, channels, out_channels, mean=0.0):
        self.generator = torch.Generator().manual_seed(height * 100 + width * 10 + channels)
        self.size = {"height": height, "width": width}
        self.rows, self.channels, self.out_channels = images * height * width, channels, out_channels
        self.images, self.mean = images, mean

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def matrix(self, channels, rows=None):
        return self.normal(rows or self.rows, channels)

    def weight(self, kernel):
        fan_in = self.channels * kernel * kernel
        return self.normal(self.out_channels, self.channels, kernel, kernel) / fan_in**0.5

    def input(self, with_mean=False):
        """x and its affine map, some channels with a negative scale; the mean too where a backward wants it."""
        scale = self.uniform(0.5, 1.5, self.channels) * self.normal(self.channels).sign()
        shift = self.normal(self.channels) - self.mean * scale
        activation = self.matrix(self.channels)
        x = (activation + 0.3 * activation.sign() - shift) / scale
        return {"x": x, **({"mean": x.mean(0)} if with_mean else {}), "scale": scale, "shift": shift}

    def batch_norm_affine(self):
        statistics = {"mean": self.normal(self.channels) + self.mean, "variance": self.uniform(0.1, 5, self.channels)}
        parameters = {"weight": self.normal(self.channels), "bias": self.normal(self.channels)}
        affine = {"affine": torch.empty(4, self.channels, dtype=torch.float64)}
        return self.case("batch_norm_affine", {**statistics, **parameters, "eps": 1e-5, **affine})

    def batch_norm_gradients(self):
        names = ("sum_grad", "sum_grad_x", "rstd", "scale")
        vectors = {name: self.normal(self.channels) for name in names}
        added = {"slope": self.normal(self.channels), "offset": self.normal(self.channels)}
        arguments = {**vectors, "count": max(self.rows, 1), **self.vectors("grad_weight"), **added}
        return self.case("batch_norm_gradients", arguments, added=tuple(added))

    def channel_stats(self):
        x = self.normal(self.rows, self.channels) * self.uniform(0.1, 5, self.channels) + self.normal(self.channels)
        return self.case("channel_stats", {"x": x + self.mean, **self.vectors("mean", "variance")})

    def write_with_statistics(self):
        pixels = math.prod(self.size.values())
        x = self.normal(self.images, pixels, self.channels) * self.uniform(0.1, 5, self.channels)
        x = (x + self.normal(self.channels) + self.mean).transpose(1, 2)
        arguments = {"x": x, "out": self.matrix(self.channels), **self.vectors("mean", "variance")}
        return self.case("write_with_statistics", arguments)

    def bn_relu_conv1x1(self):
        return self.forward("bn_relu_conv1x1", self.weight(1), {})

    def bn_relu_conv3x3(self):
        return self.forward("bn_relu_conv3x3", self.weight(3), self.size)

    def forward(self, operation, weight, size):
        statistics = self.vectors("mean", "variance", channels=self.out_channels)
        out = self.matrix(self.out_channels)
        return self.case(operation, {**self.input(), "weight": weight, **size, "out": out, **statistics})

    def bn_relu_conv1x1_backward(self):
        out = self.matrix(self.out_channels)
        finish = {"out_slope": self.normal(self.out_channels) * 0.3, "out_offset": self.normal(self.out_channels) * 0.3}
        weight = self.weight(1)
        return self.case(
            "bn_relu_conv1x1_backward",
            {
                "out_grad": self.matrix(self.out_channels), "out": out, "out_mean": out.mean(0), **finish,
                **self.input(with_mean=True), "weight": weight, "grad": self.matrix(self.channels),
                "grad_weight": weight, **self.vectors("sum_grad", "sum_grad_x"),
            },
            accumulate=True,
        )  # fmt: skip

    def bn_relu_conv3x3_backward(self, accumulate=True):
        weight = self.weight(3)
        return self.case(
            "bn_relu_conv3x3_backward",
            {
                "out_grad": self.matrix(self.out_channels), **self.input(with_mean=True), "weight": weight,
                **self.size, "grad": self.matrix(self.channels), "accumulate": accumulate, "grad_weight": weight,
                **self.vectors("sum_grad", "sum_grad_x"),
            },
            accumulate=accumulate,
        )  # fmt: skip

    def project_gradient(self):
        x = self.matrix(self.channels) + self.mean
        vectors = {"mean": x.mean(0), "slope": self.normal(self.channels), "offset": self.normal(self.channels)}
        return self.case("project_gradient", {"grad": self.matrix(self.channels), "x": x, **vectors}, accumulate=True)

    def bn_relu_avg_pool(self, window=None):
        windows, size = self.windows(window)
        return self.case(
            "bn_relu_avg_pool", {**self.input(), **self.size, **size, "out": self.matrix(self.channels, windows)}
        )

    def bn_relu_avg_pool_backward(self, window=None, accumulate=True):
        windows, size = self.windows(window)
        return self.case(
            "bn_relu_avg_pool_backward",
            {
                "out_grad": self.matrix(self.channels, windows), **self.input(with_mean=True), **self.size, **size,
                "grad": self.matrix(self.channels), "accumulate": accumulate, **self.vectors("sum_grad", "sum_grad_x"),
            },
            accumulate=accumulate,
        )  # fmt: skip

    def windows(self, window):
        """The number of windows in all images, and the window's size; without one, the transition's or else all."""
        height, width = self.size.values()
        window = window or ((2, 2) if min(height, width) >= 2 else (height, width))
        number = self.images * (height // window[0]) * (width // window[1])
        return number, {"window_height": window[0], "window_width": window[1]}

    def pooled_rows(self):
        height, width = self.size.values()
        return self.images * ((height - 1) // 2 + 1) * ((width - 1) // 2 + 1)

    def bn_relu_max_pool(self):
        out = self.matrix(self.channels, self.pooled_rows())
        return self.case("bn_relu_max_pool", {**self.input(), **self.size, "out": out})

    def bn_relu_max_pool_backward(self):
        return self.case(
            "bn_relu_max_pool_backward",
            {
                "out_grad": self.matrix(self.channels, self.pooled_rows()), **self.input(with_mean=True), **self.size,
                "grad": self.matrix(self.channels), **self.vectors("sum_grad", "sum_grad_x"),
            },
        )  # fmt: skip

    def vectors(self, *names, channels=None):
        return {name: torch.empty(channels or self.channels, dtype=torch.float64) for name in names}

    @staticmethod
    def case(operation, arguments, accumulate=False, added=()):
        schema = getattr(torch.ops.densenet_efficient, operation).default._schema
        assert list(arguments) == [argument.name for argument in schema.arguments]
        written = [argument.name for argument in schema.arguments if argument.alias_info is not None]
        added = ("grad",) if accumulate else added
        return Case(operation, arguments, {name: name in added for name in written})


def in_slot(matrix):
    """The same [M, C] as a slot of a wider storage."""
    rows, channels = matrix.shape
    storage = matrix.new_full((rows, channels + 11), BOUNDARY)
    slot = storage[:, 5 : 5 + channels]
    slot.copy_(matrix)
    return slot


def cast(case, dtype, device="cpu"):
    """The case's arguments rounded to ``dtype``; what is only written starts as NaN."""
    arguments = dict(case.arguments)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        accumulated = value.dim() == 1 or name in ("grad_weight", "affine")
        value = value.to(device, accumulation_dtype(dtype) if accumulated else dtype)
        arguments[name] = torch.full_like(value, torch.nan) if case.written.get(name) is False else value
    return arguments


def run(backend, case, arguments, place=in_slot):
    """Carries the case out on ``arguments``; what it has written, by name."""
    placed = {name: place(value) if in_storage(name, value) else copied(value) for name, value in arguments.items()}
    getattr(backend, case.operation)(**placed)
    for name, value in placed.items():
        if in_storage(name, value) and place is in_slot:
            assert_boundary(name, value)
        may_change = name in case.written or name in SCRATCH.get(case.operation, ())
        if isinstance(value, torch.Tensor) and not may_change:
            assert same_values(value, arguments[name]), f"{name} is an input, and was modified"
    return {name: placed[name] for name in case.written}


def at_the_end_of_memory(tensor):
    """The same in front of a page that may not be accessed: who reads or writes beyond a tensor is killed."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    whole = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
    placed = torch.frombuffer(memory, dtype=tensor.dtype, offset=whole - tensor.nbytes, count=tensor.numel())
    return placed.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def in_storage(name, value):
    """Whether the argument is a matrix [M, C], which a caller may take out of a wider one."""
    return isinstance(value, torch.Tensor) and value.dim() == 2 and name != "affine"


def same_values(one, other):
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_boundary(name, slot):
    storage = slot._base
    outside = torch.cat([storage[:, :5], storage[:, 5 + slot.shape[1] :]], 1)
    assert (outside == BOUNDARY).all(), f"{name} was written outside its slot"


def upcast(arguments):
    return {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def errors(actual, expected):
    """The error of a result in the Euclidean and in the maximum norm, relative to the expected."""
    difference, expected = actual.double() - expected, expected
    return [float(difference.norm(p=norm) / expected.norm(p=norm).clamp_min(1e-30)) for norm in (2, torch.inf)]


def assert_exact(backend, case, dtype, place=in_slot, floors=FLOORS, device="cpu"):
    """The backend against float64 on the same rounded arguments, its error bounded by that of plain torch."""
    arguments = cast(case, dtype, device)
    truth = run(reference, case, upcast(arguments))
    results = run(backend, case, arguments, place)
    plain = run(reference, case, arguments)
    for name, expected in truth.items():
        assert results[name].isfinite().all(), f"{name} has elements that nobody wrote"
        bounds = [2 * error + floors[dtype] for error in errors(plain[name], expected)]
        found = errors(results[name], expected)
        assert all(error <= bound for error, bound in zip(found, bounds, strict=True)), (name, found, bounds)


def assert_nothing(results):
    """Statistics and sums over no rows are zero."""
    names = ("mean", "variance", "grad_weight", "sum_grad", "sum_grad_x")
    assert all(not results[name].any() for name in names if name in results)


def assert_nothing_beyond_is_touched(backend, case, arguments):
    """Whatever is touched beyond an argument kills the process; the results are those of any other place."""
    expected = run(backend, case, arguments)
    layouts = (torch.Tensor.clone, torch.Tensor.contiguous) if case.operation == "write_with_statistics" else (copied,)
    for layout in layouts:
        placed = arguments | {"x": layout(arguments["x"])} if "x" in arguments else arguments
        placed = {name: at_the_end_of_memory(value) for name, value in placed.items()}
        getattr(backend, case.operation)(**placed)
        assert all(same_values(placed[name], value) for name, value in expected.items())


def assert_same_finite(results, expected):
    """Non-finite values where plain torch has them and nowhere else: neither hidden by a mask nor spread by padding."""
    for name, value in expected.items():
        assert torch.equal(are_finite(results[name]), are_finite(value)), name


def are_finite(result):
    """By element; of a weight's gradient by pair of channels, for torch's own convolutions differ in single taps."""
    return result.isfinite() if result.dim() < 4 else result.isfinite().flatten(2).all(2)


def assert_statistics_of_stored(results):
    """The statistics are those of ``out`` as stored, to the accuracy of their own dtype."""
    variance, mean = torch.var_mean(results["out"].double(), 0, correction=0)
    tolerance = 1e-12 if results["out"].dtype == torch.float64 else 1e-6
    spread = variance.sqrt() + mean.abs()
    assert ((results["mean"] - mean).abs() <= tolerance * spread).all()
    assert ((results["variance"] - variance).abs() <= 2 * tolerance * variance + 1e-30).all()


def write_images(backend, x, layout):
    """`write_with_statistics` of ``x`` [N, C, P] in this layout into a slot, checked; what it has written, by name."""
    images = LAYOUTS[layout](x)
    out = in_slot(torch.full_like(x.transpose(1, 2).flatten(0, 1), torch.nan))
    mean, variance = torch.full((2, x.shape[1]), torch.nan, dtype=accumulation_dtype(x.dtype), device=x.device)
    backend.write_with_statistics(images, out, mean, variance)
    assert_boundary("out", out)
    assert torch.equal(out, x.transpose(1, 2).flatten(0, 1)), layout
    results = {"out": out, "mean": mean, "variance": variance}
    assert_statistics_of_stored(results)
    return results


def assert_norms_of_any_stride(backend, device="cpu"):
    """As a user's pruning leaves them, ``norm.weight[::2]``."""
    vectors = (torch.rand(4, 37, 2, device=device) + 0.5)[..., 0]
    affine, expected = vectors.new_empty(4, 37), vectors.new_empty(4, 37)
    backend.batch_norm_affine(*vectors, 1e-5, affine)
    reference.batch_norm_affine(*vectors.contiguous(), 1e-5, expected)
    torch.testing.assert_close(affine, expected, rtol=1e-6, atol=1e-6)


def assert_the_first_of_equal_maxima(backend, device="cpu"):
    """Equal as the storage's dtype has them: after rounding, 1 + 2^-9 is 1 in bfloat16."""
    x = torch.ones(4, 8, dtype=torch.bfloat16, device=device)
    x[3] = 1 + 2**-7
    scale, shift, mean, *sums = torch.tensor([2**-2, 0.75, 0, 0, 0], device=x.device)[:, None].repeat(1, 8)
    assert (x * scale + shift).bfloat16().unique().numel() == 1
    grad = torch.empty_like(x)
    backend.bn_relu_max_pool_backward(x[:1], x, mean, scale, shift, 2, 2, grad, *sums)
    assert grad[:, 0].tolist() == [0.25, 0, 0, 0]
