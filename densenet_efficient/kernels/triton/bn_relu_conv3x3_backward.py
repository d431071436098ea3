"""Backward of the 3x3 convolution: one kernel for the gradient of its input, one for that of its weight."""

from torch import Tensor

from .bn_relu_conv3x3_backward_input import input_gradient
from .bn_relu_conv3x3_backward_weight import weight_gradient


def bn_relu_conv3x3_backward(
    out_grad: Tensor,  # [M, K]
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    weight: Tensor,  # [K, C, 3, 3]
    height: int,
    width: int,
    grad: Tensor | None,  # [M, C]
    accumulate: bool,
    grad_weight: Tensor | None,  # [K, C, 3, 3]
    sum_grad: Tensor | None,  # [C]
    sum_grad_x: Tensor | None,  # [C]
) -> None:
    """Backward of `bn_relu_conv3x3`: what is asked for of the gradients of its input and its weight."""
    if grad_weight is not None:
        weight_gradient(out_grad, x, scale, shift, height, width, grad_weight)
    if sum_grad is not None and sum_grad_x is not None:
        input_gradient(out_grad, x, mean, scale, shift, weight, height, width, grad, accumulate, sum_grad, sum_grad_x)
