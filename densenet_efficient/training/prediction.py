"""Predictions: image files in, a CSV with probabilities out, as it goes and as often interrupted as need be."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import BasePredictionWriter
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from densenet_efficient.training.checkpoint import SavedClassifier, load_classifier
from densenet_efficient.training.check import listing
from densenet_efficient.training.images import read_image
from densenet_efficient.training.samples import list_images, read_rows

Views = Literal["none", "mirror", "dihedral"]
