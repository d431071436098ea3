"""Image files as tensors: whatever Pillow reads, of 8 or 16 bits, and DICOM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import Image as ImageTensor

from densenet_efficient.training.dicom import read_dicom
from densenet_efficient.training.pixel_values import UNREADABLE, ValueRange, require_finite, unit

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".pnm"}
    | {".tif", ".tiff", ".webp", ".avif", ".dcm", ".dicom"}
)
DICOM_MAGIC = b"DICM"  # at byte 128
# What makes an image upright, by its EXIF orientation.
TURNS: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
WHITE_IS_ZERO = 0  # its photometric interpretation of images as films are


def is_image(path: Path) -> bool:
    """Whether a file says that it is an image: by its name, or as DICOM, whose files often have none, by its start."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    with open(path, "rb") as file:
        return file.read(132)[128:] == DICOM_MAGIC


def read_image(path: str | Path, channels: int, value_range: ValueRange = None) -> ImageTensor:
    """The image file `path` as [channels, H, W], 1 or 3 channels: uint8, or float32 in [0, 1] if it is deeper.

    `value_range` are the values that become 0 and 1 in images deeper than 8 bits, in Hounsfield units for CT, and of
    DICOM files in such units. Without it they are the window that a DICOM file names, or its table's, else the darkest
    and the brightest value there is, and of other files the range of their bits.

    Raises OSError if the file is missing, ValueError if it is damaged, empty, no image or a TIFF of
    several pages. Of an animation it is the first picture.
    """
    with open(path, "rb") as file:
        head = file.read(132)
        if head[128:] == DICOM_MAGIC:
            return _with_channels(read_dicom(path, value_range), channels)
        file.seek(0)
        try:
            image: Image.Image = Image.open(file)
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            image.load()
        except UnidentifiedImageError as error:  # which names the file a second time
            raise ValueError(f"{path}: {UNREADABLE}") from error
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plugins raise many kinds for damaged files
            raise ValueError(f"{path}: {UNREADABLE} ({error})") from error
    if pages > 1:
        raise ValueError(f"{path}: expected a TIFF of one page, got {pages}; export the pages")
    if image.mode[0] in "IF":
        values = _scaled(path, _upright(image), value_range or _range_of(path, image))
        if image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # type: ignore[attr-defined]
            values = 1 - values  # which Pillow does up to 8 bits
        return _with_channels(torch.from_numpy(values)[None], channels)
    if image.mode == "LAB":  # which Pillow turns into RGB alone
        image = image.convert("RGB")
    return F.to_image(_upright(image).convert("L" if channels == 1 else "RGB"))


def what_is_wrong(path: str | Path, error: OSError | ValueError) -> str:
    """One line of what `read_image` raised, with the file's name."""
    return f"{path}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data tell; as it is where they are damaged, which leaves the pixels whole."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow raises many kinds for damaged EXIF data
        return image
    return image if turn is None else image.transpose(turn)


def _range_of(path: str | Path, image: Image.Image) -> tuple[float, float]:
    """The range of a single-channel image's values, which a file of 16 bits tells."""
    is_deep_pgm = image.format == "PPM" and image.mode == "I"  # which Pillow brings to 16 bits from whatever it has
    if not (is_deep_pgm or image.mode.startswith("I;16")):
        raise ValueError(
            f"{path}: an image of 32 bits (PIL mode {image.mode}) does not tell its range; give value_range"
        )
    bits = image.tag_v2.get(BITS, (16,))[0] if image.format == "TIFF" else 16  # type: ignore[attr-defined]
    return 0, 2**bits - 1


def _scaled(path: str | Path, image: Image.Image, value_range: Sequence[float]) -> NDArray[np.float32]:
    """A single-channel image of 16 or 32 bits, with the range of its values brought to [0, 1]."""
    values = np.asarray(image)
    require_finite(path, values)
    return unit(values, *value_range)


def _with_channels(image: Tensor, channels: int) -> ImageTensor:
    """[1 or 3, H, W] with the wanted number of channels."""
    if image.shape[0] == 3 and channels == 1:
        return ImageTensor(F.rgb_to_grayscale(image))
    return ImageTensor(image.expand(channels, -1, -1))
