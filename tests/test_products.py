"""The products that torch computes: in their own dtype where that is fast, else in float32, with the same results."""

import pytest
import torch

from densenet_efficient import products

LOW_PRECISION = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
GEOMETRY = ([2, 2], [3, 3], [1, 1], False, [0, 0], 1)


@pytest.fixture(params=LOW_PRECISION, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["own products", "float32 products"], autouse=True)
def has_products(request, monkeypatch):
    """Whether this CPU is taken to have products of 16-bit numbers."""
    for question in LOW_PRECISION.values():
        monkeypatch.setattr(torch.ops.mkldnn, question, lambda: request.param)
    return request.param


def random(*size, dtype):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size))).to(dtype)


def assert_rounded(actual, expected, dtype):
    """Within two roundings of ``dtype``, of the largest."""
    bound = 2 * torch.finfo(dtype).eps * expected.abs().max()
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=bound.item())


def test_only_16_bit_products_on_a_cpu_are_widened(has_products, dtype):
    assert products.product_dtype(torch.empty(1, dtype=dtype)) == (dtype if has_products else torch.float32)
    for other in torch.float32, torch.float64:
        assert products.product_dtype(torch.empty(1, dtype=other)) == other
    assert products.product_dtype(torch.empty(1, dtype=dtype, device="meta")) == dtype


def test_a_cpu_may_have_products_of_one_kind(monkeypatch, dtype):
    for of, question in LOW_PRECISION.items():
        monkeypatch.setattr(torch.ops.mkldnn, question, lambda has=of == dtype: has)
    for of in LOW_PRECISION:
        assert products.product_dtype(torch.empty(1, dtype=of)) == (dtype if of == dtype else torch.float32)


@pytest.mark.parametrize("rows", [1, 7, products.ROWS_AT_A_TIME, 2 * products.ROWS_AT_A_TIME + 5])
def test_matrices(dtype, rows):
    left, right, other = random(rows, 9, dtype=dtype), random(9, 4, dtype=dtype), random(rows, 6, dtype=dtype)
    out = torch.full((rows, 4), torch.nan, dtype=dtype)
    products.multiply(left, right, out)
    assert_rounded(out, left.double() @ right.double(), dtype)
    assert_rounded(products.multiply_transposed(left, other), left.double().t() @ other.double(), dtype)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_convolutions(dtype, needed):
    x, weight = random(2, 3, 12, 9, dtype=dtype), random(4, 3, 7, 7, dtype=dtype)
    expected = torch.convolution(x.double(), weight.double(), None, *GEOMETRY)
    assert_rounded(products.convolve(x, weight, GEOMETRY), expected, dtype)
    grad = random(*expected.shape, dtype=dtype)
    grads = products.convolve_backward(grad, x, weight, GEOMETRY, needed)
    operands = grad.double(), x.double(), weight.double()
    expected_grads = torch.ops.aten.convolution_backward(*operands, None, *GEOMETRY, [*needed, False])
    for actual, of_double, wanted in zip(grads, expected_grads[:2], needed, strict=True):
        if wanted:
            assert_rounded(actual, of_double, dtype)
        else:
            assert actual is None
