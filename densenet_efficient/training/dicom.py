"""DICOM files as tensors: what the file's window, its table or the range of its values makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from densenet_efficient.training.pixel_values import UNREADABLE, ValueRange, require_finite, unit

# What pydicom says of Pillow where another decoder is needed, which is not installed.
BEYOND_PILLOW = re.compile("Pillow (does not support|cannot decode)")
# Elements that count as not there where they are empty.
MAY_BE_EMPTY = ("WindowCenter", "WindowWidth", "VOILUTFunction", "RescaleSlope", "RescaleIntercept")


def read_dicom(path: str | Path, value_range: ValueRange) -> Tensor:
    """[1 or 3, H, W] of a DICOM file: uint8, or float32 in [0, 1], as `images.read_image` has it.

    Raises ValueError if the file is damaged, of several frames, or needs a package or a decoder that is not installed.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
        from pydicom.pixels.utils import pixel_array
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: DICOM needs pydicom; pip install pydicom") from error
    dataset: Any = None
    try:
        dataset = dcmread(path)
        pixels = pixel_array(dataset)
        for name in MAY_BE_EMPTY:
            if name in dataset and dataset[name].is_empty:
                del dataset[name]
        bits = dataset.BitsStored
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels, bits = apply_color_lut(pixels, dataset), dataset.RedPaletteColorLookupTableDescriptor[2]
    except Exception as error:  # pydicom raises many kinds for damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {_lacking_decoder(dataset, reason) or f'{UNREADABLE} ({reason})'}") from error
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise ValueError(f"{path}: expected a DICOM file of one frame, got {dataset.NumberOfFrames}; export the frames")
    if pixels.ndim == 3:  # colours, as [H, W, 3], or 4 with opacity
        colours = pixels if pixels.dtype == np.uint8 else unit(pixels, 0, 2**bits - 1)
        return torch.from_numpy(np.ascontiguousarray(colours[..., :3])).permute(2, 0, 1)
    values = apply_modality_lut(pixels, dataset)
    require_finite(path, values)
    has_units = bits > 8 or (dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)) != (1, 0)
    if value_range and has_units:
        scaled = unit(values, *value_range)
    elif window := _window(dataset):
        scaled = _by_window(values, *window, function=str(dataset.get("VOILUTFunction", "LINEAR")))
    elif dataset.get("VOILUTSequence"):
        scaled = _by_table(path, dataset, values)
    else:
        scaled = unit(values, *_extremes(dataset, pixels, values))
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # the lowest value is white
        scaled = 1 - scaled
    return torch.from_numpy(scaled)[None]


def _lacking_decoder(dataset: Any, reason: str) -> str | None:
    """What would decode the pixels of a DICOM file, where nothing that is installed does; None if something does."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    syntax = getattr(dataset, "file_meta", {}).get("TransferSyntaxUID")
    if not isinstance(syntax, UID) or not syntax:
        return None
    name = syntax.name if syntax.name == syntax else f"{syntax.name} ({syntax})"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return f"its transfer syntax, {name}, is none that pydicom decodes; convert the file to an uncompressed one"
    if decoder.is_available and not BEYOND_PILLOW.search(reason):
        return None
    by_gdcm = any(text.startswith("gdcm") for text in decoder.missing_dependencies)
    remedy = "pip install python-gdcm, or 'pylibjpeg[all]'" if by_gdcm else "pip install 'pylibjpeg[all]'"
    return f"no decoder of its transfer syntax, {name}, is installed; {remedy}"


def _by_table(path: str | Path, dataset: Any, values: NDArray[Any]) -> NDArray[np.float32]:
    """By the first table of a DICOM file, which may well turn dark into bright (PS3.3 C.11.2.1.1)."""
    from pydicom.pixels.processing import apply_voi

    try:
        looked_up = apply_voi(np.rint(values).astype(np.int64), dataset)
        return unit(looked_up, 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1)
    except Exception as error:  # pydicom raises many kinds for damaged tables
        raise ValueError(f"{path}: {UNREADABLE} ({' '.join(str(error).split())})") from error


def _extremes(dataset: Any, pixels: NDArray[Any], values: NDArray[Any]) -> tuple[float, float]:
    """The lowest and highest value, without those of the padding around the image."""
    within = pixels != dataset.get("PixelPaddingValue")
    inner = values[within] if np.any(within) else values
    return float(inner.min()), float(inner.max())


def _window(dataset: Any) -> tuple[float, float] | None:
    """Center and width of the first window of a DICOM file; None without one, or where some write a width for none."""
    if "WindowCenter" not in dataset or "WindowWidth" not in dataset:
        return None
    center, width = (float(np.atleast_1d(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    is_linear = dataset.get("VOILUTFunction", "LINEAR") == "LINEAR"
    return None if width <= 0 or (is_linear and width < 1) else (center, width)


def _by_window(values: NDArray[Any], center: float, width: float, function: str) -> NDArray[np.float32]:
    """As DICOM has it (PS3.3 C.11.2.1.2.1, C.11.2.1.3)."""
    if function == "SIGMOID":
        return torch.sigmoid(torch.from_numpy(4 * (values.astype(np.float32) - center) / width)).numpy()
    if function == "LINEAR_EXACT":
        return unit(values, center - width / 2, center + width / 2)
    low = center - 0.5 - (width - 1) / 2
    return unit(values, low, low + width - 1)
