"""Small data sets and runs for the tests of the training."""

from __future__ import annotations

import csv
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from pytorch_lightning import Trainer
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from densenet_efficient.cli import main
from densenet_efficient.training.checkpoint import read_checkpoint

LUMINANCE = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue; it cuts off the fraction


def make_images(folder: Path, per_class: int = 6, names: tuple[str, ...] = ("bright", "dark")) -> Path:
    """12x10 images, one subfolder a class, each class and each image of its own brightness."""
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            brightness = 220 - 190 * label // max(len(names) - 1, 1) + index
            Image.new("RGB", (12, 10), (brightness,) * 3).save(folder / name / f"{index}.png")
    return folder


def write_dicom(path: Path, pixels: NDArray[Any], **elements: Any) -> Path:
    """A slice of 16 bits [H, W], with these further elements, which may make another image of it."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation = 15, 0
    dataset.PixelData = pixels.astype("<u2").tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def make_cifar(root: Path, monkeypatch: Any, classes: int = 10) -> None:
    """Files as torchvision downloads them, of two or three random images per class and file."""
    kind = {10: CIFAR10, 100: CIFAR100}[classes]
    labels, name, names = (
        ("labels", "batches.meta", "label_names") if classes == 10 else ("fine_labels", "meta", "fine_label_names")
    )
    folder = root / kind.base_folder
    folder.mkdir()
    copies = 2 if classes == 10 else 3
    pixels = np.random.default_rng(0).integers(0, 256, (copies * classes, 3072), dtype=np.uint8)
    for part, _ in (*kind.train_list, *kind.test_list):
        (folder / part).write_bytes(pickle.dumps({"data": pixels, labels: [*range(classes)] * copies}))
    (folder / name).write_bytes(pickle.dumps({names: [f"class {number}" for number in range(classes)]}))
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})


def fit_arguments(images: Path, output: Path, *more: str) -> list[str]:
    """Three epochs of five batches of a small network on 8x8 images."""
    options = {
        "--data": images,
        "--data.image_size": 8,
        "--data.batch_size": 4,
        "--data.num_workers": 0,
        "--data.augmentation": "medical",
        "--model.network": "densenet-bc-40-12",
        "--model.drop_rate": 0.2,
        "--model.mixup": 0.4,
        "--trainer.max_epochs": 3,
        "--trainer.accelerator": "cpu",
        "--trainer.enable_progress_bar": "false",
        "--report": "false",
        "--output": output,
    }
    return ["fit", *(str(part) for pair in options.items() for part in pair), *more]


def fit(images: Path, output: Path, *more: str) -> int:
    return main(fit_arguments(images, output, *more))


def weights(output: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    """The weights in a checkpoint; with averaging, the averaged and the current ones."""
    content = read_checkpoint(output / name)
    current = {f"current.{key}": value for key, value in content.get("current_model_state", {}).items()}
    return content["state_dict"] | current


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def stopping_at(monkeypatch: Any, batch: int, stop: Callable[[Trainer], None]) -> None:
    """Call `stop` after the batch of this number of a run, counted from 1."""
    from densenet_efficient.training.history import History

    def on_train_batch_end(self: Any, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == batch:
            stop(trainer)

    monkeypatch.setattr(History, "on_train_batch_end", on_train_batch_end)


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    return err


def make_patients(folder: Path) -> list[dict[str, Any]]:
    """Images of ten patients, two of each, and the rows of a table of them."""
    make_images(folder, per_class=10)
    return [
        {"path": f"{name}/{index}.png", "label": name, "patient": f"{name} {index // 2}", "split": "train"}
        for name in ("bright", "dark")
        for index in range(10)
    ]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path
