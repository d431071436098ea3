"""The products that torch computes, of the stem, the transitions and unusual kernels, where they are fast.

Most CPUs have no instructions for products of 16-bit numbers. There torch, which needs them, falls back to loops that
take ten to thirty times as long as the product of the same numbers in float32, the dtype in which both sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A convolution's stride, padding, dilation, whether it is transposed, output padding and groups.
Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]

ROWS_AT_A_TIME = 2**12  # of a product whose operands are widened, so that these stay in the cache


def geometry(stride: Sequence[int], padding: Sequence[int], dilation: int) -> Geometry:
    """What torch.convolution takes after the bias."""
    axes = len(stride)
    return list(stride), list(padding), [dilation] * axes, False, [0] * axes, 1


def product_dtype(operand: Tensor) -> torch.dtype:
    """The dtype in which torch is to multiply ``operand``: its own, or float32 where its own would be slow."""
    has_products = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(operand.dtype)
    if operand.device.type != "cpu" or has_products is None or has_products():
        return operand.dtype
    return torch.float32


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out [M, N] = left [M, K] @ right [K, N]."""
    dtype = product_dtype(left)
    if dtype == left.dtype:
        torch.mm(left, right, out=out)
        return
    right = right.to(dtype)
    for some_left, some_out in zip(left.split(ROWS_AT_A_TIME), out.split(ROWS_AT_A_TIME), strict=True):
        some_out.copy_(some_left.to(dtype) @ right)


def multiply_transposed(left: Tensor, right: Tensor) -> Tensor:
    """left^T @ right [K, N], for left [M, K] and right [M, N]; in `product_dtype`."""
    dtype = product_dtype(left)
    if dtype == left.dtype:
        return left.t() @ right
    product = left.new_zeros(left.shape[1], right.shape[1], dtype=dtype)
    for some_left, some_right in zip(left.split(ROWS_AT_A_TIME), right.split(ROWS_AT_A_TIME), strict=True):
        product.addmm_(some_left.to(dtype).t(), some_right.to(dtype))
    return product


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The convolution of x [N, C, ...] without a bias, in `product_dtype`."""
    dtype = product_dtype(x)
    return torch.convolution(x.to(dtype), weight.to(dtype), None, *geometry)


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needed: Sequence[bool]
) -> tuple[Any, Any]:
    """The gradients of (x, weight) of `convolve`, in `product_dtype`; None where not needed."""
    dtype = product_dtype(x)
    grads = torch.ops.aten.convolution_backward(
        grad.to(dtype), x.to(dtype), weight.to(dtype), None, *geometry, [*needed, False]
    )
    return grads[0], grads[1]
