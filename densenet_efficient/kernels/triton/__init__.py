"""The Triton backend: one file per operation, under the contract of `densenet_efficient.kernels`."""

from .bn_relu_conv1x1 import bn_relu_conv1x1
from .bn_relu_conv1x1_backward import bn_relu_conv1x1_backward

__all__ = ["bn_relu_conv1x1", "bn_relu_conv1x1_backward"]
