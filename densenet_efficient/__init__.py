"""DenseNets whose training keeps almost no activations and takes less time, with the same results."""

from .backbone import Backbone
from .concatenation import concatenate
from .conversion import convert, revert
from .kernels import return_freed_memory
from .models import (
    EfficientDenseNet,
    EfficientDenseNet121,
    EfficientDenseNet161,
    EfficientDenseNet169,
    EfficientDenseNet201,
    EfficientDenseNet264,
)
from .modules import DenseBlock, DenseLayer, Features, Transition
from .planning import plan
from .segmentation import FCDenseNet, FCDenseNet56, FCDenseNet67, FCDenseNet103
from .weights import load_weights

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "DenseBlock",
    "DenseLayer",
    "EfficientDenseNet",
    "EfficientDenseNet121",
    "EfficientDenseNet161",
    "EfficientDenseNet169",
    "EfficientDenseNet201",
    "EfficientDenseNet264",
    "FCDenseNet",
    "FCDenseNet56",
    "FCDenseNet67",
    "FCDenseNet103",
    "Features",
    "Transition",
    "concatenate",
    "convert",
    "load_weights",
    "plan",
    "return_freed_memory",
    "revert",
]
