"""Backward of the 1x1 convolution: in one pass over the storage where that is possible, else in one per product."""

from torch import Tensor

from . import bn_relu_conv1x1_backward_joint as joint
from . import bn_relu_conv1x1_backward_split as split


def bn_relu_conv1x1_backward(
    out_grad: Tensor,  # [M, K]
    out: Tensor,  # [M, K]
    out_mean: Tensor,  # [K]
    out_slope: Tensor,  # [K]
    out_offset: Tensor,  # [K]
    x: Tensor,  # [M, C]
    mean: Tensor,  # [C]
    scale: Tensor,  # [C]
    shift: Tensor,  # [C]
    weight: Tensor,  # [K, C, 1, 1]
    grad: Tensor | None,  # [M, C]
    grad_weight: Tensor | None,  # [K, C, 1, 1]
    sum_grad: Tensor | None,  # [C]
    sum_grad_x: Tensor | None,  # [C]
) -> None:
    """Backward of `bn_relu_conv1x1`, adding into ``grad``; the gradient of ``out`` is finished on its way."""
    finish = (out_grad, out, out_mean, out_slope, out_offset)
    matrix = weight.flatten(1).to(x.dtype).contiguous()
    grad_matrix = None if grad_weight is None else grad_weight.flatten(1)
    sums = None if sum_grad is None or sum_grad_x is None else (sum_grad, sum_grad_x)
    if grad_matrix is not None and sums is not None and joint.serves(x, matrix.shape[0]):
        joint.input_and_weight_gradient(*finish, x, mean, scale, shift, matrix, grad, grad_matrix, *sums)
        return
    if grad_matrix is not None:
        split.weight_gradient(*finish, x, scale, shift, grad_matrix)
    if sums is not None:
        split.input_gradient(*finish, x, mean, scale, shift, matrix, grad, *sums)
