"""The stem at inference: convolution, batch norm, ReLU and maximum pooling by one kernel."""

import pytest
import torch
import torch.nn.functional as F
from cases import make_images, make_pair, needs_native
from torch import nn

from densenet_efficient import operators

pytestmark = needs_native

TOLERANCES = {torch.float64: 2e-15, torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of the norm
SHAPES = {  # of the images, outputs, kernel, stride and padding
    "that of the paper": ((2, 3, 70, 66), 64, (7, 7), (2, 2), (3, 3)),
    "grey": ((3, 1, 65, 33), 96, (7, 7), (2, 2), (3, 3)),
    "unlike axes": ((2, 3, 7, 9), 13, (3, 5), (1, 3), (0, 2)),
    "one pixel": ((1, 2, 1, 1), 8, (1, 1), (1, 1), (0, 0)),
    "a row of outputs": ((2, 3, 3, 40), 24, (3, 3), (1, 1), (0, 1)),
    "a column of outputs": ((1, 2, 40, 3), 20, (3, 3), (2, 2), (1, 0)),
    "sparser than its kernel": ((1, 3, 41, 37), 16, (2, 2), (4, 3), (1, 2)),
    "strides far beyond the image": ((1, 2, 20, 9), 16, (3, 3), (2**40, 2**40), (1, 1)),
    "many channels": ((2, 20, 12, 14), 40, (3, 3), (1, 1), (1, 1)),
    "more rows than of a task": ((1, 3, 150, 10), 16, (3, 3), (1, 1), (1, 1)),
    "three bands": ((2, 3, 130, 6), 8, (3, 3), (1, 1), (1, 0)),
    "few taps": ((2, 1, 4, 12), 8, (3, 3), (1, 1), (0, 0)),
}
LAYOUTS = {
    "contiguous": lambda images: images.contiguous(),
    "channels last": lambda images: images.contiguous(memory_format=torch.channels_last),
    "every other column": lambda images: images.repeat_interleave(2, dim=3)[..., ::2],
    "some of the channels": lambda images: torch.cat((images, images), 1).contiguous(memory_format=torch.channels_last)[
        :, : images.shape[1]
    ],
}


class Case:
    """A stem's arguments."""

    def __init__(self, shape, dtype, layout="contiguous"):
        size, outputs, kernel, self.stride, self.padding = SHAPES[shape]
        generator = torch.Generator().manual_seed(0)
        draw = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)  # noqa: E731
        self.x = LAYOUTS[layout](draw(*size).to(dtype))
        self.weight = draw(outputs, size[1], *kernel).to(dtype)
        accumulated = torch.float64 if dtype == torch.float64 else torch.float32
        self.scale, self.shift = draw(outputs).to(accumulated), draw(outputs).to(accumulated)

    def expected(self):
        """In float64, of a convolution that is rounded to the images' dtype."""
        conv = F.conv2d(self.x.double(), self.weight.double(), None, self.stride, self.padding).to(self.x.dtype)
        norm = conv.double() * self.scale.double()[:, None, None] + self.shift.double()[:, None, None]
        return F.max_pool2d(F.relu(norm), 3, 2, 1)

    def out(self):
        """Empty, between columns that are not to be written."""
        images, channels, height, width = self.expected().shape
        wide = self.x.new_full((images * height * width, channels + 5), 7)
        wide[:, 2:-3] = torch.nan
        return wide

    def run(self, **changed):
        images, channels, height, width = self.expected().shape
        wide = self.out()
        arguments = {**vars(self), "out": wide[:, 2:-3]} | changed
        torch.ops.densenet_efficient.conv_bn_relu_max_pool(**arguments)
        assert (wide[:, :2] == 7).all()
        assert (wide[:, -3:] == 7).all()
        return wide[:, 2:-3].reshape(images, height, width, channels).permute(0, 3, 1, 2)


@pytest.mark.each_capability
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, layout, dtype):
    case = Case(shape, dtype, layout)
    expected = case.expected()
    assert torch.linalg.norm(case.run().double() - expected) <= TOLERANCES[dtype] * torch.linalg.norm(expected)


@pytest.mark.each_capability
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_it_is_seen(value, dtype):
    """Products read beyond a pixel's window, where weights are zero: zero times NaN would be NaN."""
    case = Case("that of the paper", dtype)
    for image, y, x in ((0, 20, 30), (1, 0, 65)):
        case.x[image, 0, y, x] = value
    found, expected = case.run(), case.expected()
    assert found.isfinite().any()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    finite = expected.isfinite()
    error = torch.linalg.norm(found.double()[finite] - expected[finite])
    assert error <= TOLERANCES[dtype] * torch.linalg.norm(expected[finite])


@pytest.mark.each_capability
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_not_finite_is_found_wherever_it_is(dtype):
    for position in range(48):
        case = Case("few taps", dtype)
        case.x[1].view(-1)[position] = torch.nan
        assert torch.equal(case.run().isnan(), case.expected().isnan()), position


@pytest.mark.each_capability
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_left_of_another_band_is_not_read(dtype):
    """Of an image's three bands the last is of most rows, and the first of the next image behind those of its own."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for row in range(130):
            case = Case("three bands", dtype)
            case.x[0, :, row, 0] = torch.nan
            assert case.run()[1].isfinite().all(), row
    finally:
        torch.set_num_threads(threads)


@pytest.mark.each_capability
@pytest.mark.parametrize(("dtype", "large"), [(torch.float16, 2048.0), (torch.bfloat16, 256.0)], ids=str)
def test_the_convolution_is_rounded_before_its_norm(dtype, large):
    case = Case("one pixel", dtype)
    case.x.view(-1)[:] = torch.tensor([large, 1.0])
    case.weight.fill_(1.0)
    case.scale.fill_(1.0)
    case.shift.fill_(-large)
    assert not case.run().any()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_weight_of_some_of_the_channels_and_outputs(dtype):
    case = Case("that of the paper", dtype)
    expected = case.run()
    wide = case.weight.new_full((129, 5, 7, 7), torch.nan)
    wide[1::2, 1:4] = case.weight
    assert torch.equal(case.run(weight=wide[1::2, 1:4]), expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_bits_depend_on_neither_threads_nor_other_images(dtype):
    case = Case("that of the paper", dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            found.append(case.run())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    both, case.x = found[0], case.x[1:]
    assert torch.equal(case.run()[0], both[1])


WRONG = {
    "x has no pixels": ({"x": torch.empty(2, 3, 0, 66)}, "x must have shape"),
    "x is one image": ({"x": torch.empty(3, 70, 66)}, "x must have shape"),
    "weight of other channels": ({"weight": torch.empty(64, 4, 7, 7)}, "weight must have shape"),
    "weight of another dtype": ({"weight": torch.empty(64, 3, 7, 7, dtype=torch.float64)}, "weight must be Float"),
    "weight without kernels": ({"weight": torch.empty(64, 3)}, "weight must have shape"),
    "weight of no outputs": ({"weight": torch.empty(0, 3, 7, 7)}, "weight must have shape"),
    "a stride of one size": ({"stride": [2]}, "a stride and a padding of two sizes"),
    "a padding of three sizes": ({"padding": [3, 3, 3]}, "a stride and a padding of two sizes"),
    "a negative stride": ({"stride": [2, -2]}, "a stride above"),
    "a stride of zero": ({"stride": [0, 2]}, "stride"),
    "a negative padding": ({"padding": [3, -1]}, "padding"),
    "padding beyond memory": ({"padding": [2**61, 2**20]}, "padding that memory can hold"),
    "padding beyond integers": ({"padding": [3, 2**62]}, "padding that memory can hold"),
    "a kernel that does not fit": ({"x": torch.empty(2, 3, 70, 1), "padding": [3, 2]}, "kernel of 7"),
    "scale of other outputs": ({"scale": torch.empty(63)}, "scale must be"),
    "shift of another dtype": ({"shift": torch.empty(64, dtype=torch.float64)}, "shift must be"),
    "out of other pixels": ({"out": torch.empty(7, 64)}, "out must have shape"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(wrong):
    changed, message = WRONG[wrong]
    with pytest.raises(RuntimeError, match=message):
        Case("that of the paper", torch.float32).run(**changed)


def use_a_kernel_of_three(model):
    model.features.conv0 = nn.Conv2d(3, model.features.conv0.out_channels, 3, stride=(1, 2), padding=1, bias=False)


def lay_out_the_weight_otherwise(model):
    weight = model.features.conv0.weight
    weight.data = weight.data.transpose(2, 3).contiguous().transpose(2, 3)


CHANGES = {"none": lambda model: None, "kernel": use_a_kernel_of_three, "layout": lay_out_the_weight_otherwise}


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_at_inference(change, monkeypatch):
    """Its stem is one kernel, and its logits those of the naive network; also after its weights have changed."""

    def refuse(*args):
        raise AssertionError("the stem ran as in training")

    naive, efficient = make_pair(mode="eval")
    CHANGES[change](efficient)
    efficient.double()
    naive.features.conv0 = efficient.features.conv0
    images = make_images(3, 3, 64, 40)
    monkeypatch.setattr(operators, "compute_stem", refuse)
    for factor in (1.0, -0.5):
        for some in (images, images[:1]):
            with torch.inference_mode():
                torch.testing.assert_close(efficient(some), naive(some), rtol=1e-9, atol=1e-9)
        naive.features.norm0.weight.data.mul_(factor)
        efficient.features.norm0.weight.data.mul_(factor)


def test_batch_statistics_need_the_whole_convolution():
    naive, efficient = make_pair(mode="eval")
    images = make_images(3, 3, 64, 40)
    for model in (naive, efficient):
        model.features.norm0.train()
    with torch.inference_mode():
        torch.testing.assert_close(efficient(images), naive(images), rtol=1e-9, atol=1e-9)


class OfPyTorchAlone(torch.Tensor):
    """A weight that holds its values elsewhere, and knows no operations but PyTorch's."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function.namespace == "aten", function
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        unwrap = lambda value: value.inner if isinstance(value, cls) else value  # noqa: E731
        return function(*map(unwrap, args), **(kwargs or {}))


def test_a_weight_that_knows_no_kernels():
    naive, efficient = make_pair(mode="eval")
    conv = efficient.features.conv0
    conv.weight = nn.Parameter(OfPyTorchAlone(conv.weight.detach()), requires_grad=False)
    images = make_images(3, 3, 64, 40)
    with torch.no_grad():
        torch.testing.assert_close(efficient(images), naive(images), rtol=1e-9, atol=1e-9)
