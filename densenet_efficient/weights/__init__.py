"""Weights from files, torchvision, timm, Keras and the Hugging Face Hub: nothing executed, every key accounted for."""

from .loading import load_weights
from .preprocessing import Preprocessing
from .pretrained import PretrainedNetwork

__all__ = ["Preprocessing", "PretrainedNetwork", "load_weights"]
