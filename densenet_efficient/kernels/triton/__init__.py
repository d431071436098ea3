"""The Triton backend: one file per operation, under the contract of `densenet_efficient.kernels`."""

from .batch_norm_affine import batch_norm_affine
from .batch_norm_gradients import batch_norm_gradients
from .bn_relu_avg_pool import bn_relu_avg_pool
from .bn_relu_avg_pool_backward import bn_relu_avg_pool_backward
from .bn_relu_conv1x1 import bn_relu_conv1x1
from .bn_relu_conv1x1_backward import bn_relu_conv1x1_backward
from .bn_relu_conv3x3 import bn_relu_conv3x3
from .bn_relu_conv3x3_backward import bn_relu_conv3x3_backward
from .bn_relu_max_pool import bn_relu_max_pool
from .bn_relu_max_pool_backward import bn_relu_max_pool_backward
from .channel_stats import channel_stats
from .project_gradient import project_gradient
from .write_with_statistics import write_with_statistics

__all__ = [
    "batch_norm_affine",
    "batch_norm_gradients",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_backward",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward",
    "channel_stats",
    "project_gradient",
    "write_with_statistics",
]
