"""Weights from files, torchvision, timm, Keras and the Hugging Face Hub: nothing executed, every key accounted for."""

from .loading import load_weights
from .pretrained import PretrainedNetwork

__all__ = ["PretrainedNetwork", "load_weights"]
