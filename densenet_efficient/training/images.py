"""Image files as tensors: whatever Pillow reads, of 8 or 16 bits, and DICOM."""

from __future__ import annotations

import re
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

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".j2k", ".bmp", ".gif", ".pbm", ".pgm", ".ppm", ".pnm"}
    | {".tif", ".tiff", ".webp", ".avif", ".dcm", ".dicom"}
)
DICOM_MAGIC = b"DICM"  # at byte 128
UNREADABLE = "expected an undamaged image such as PNG, JPEG, TIFF or DICOM"
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
# What pydicom says of Pillow where another decoder is needed, which is not installed.
BEYOND_PILLOW = re.compile("Pillow (does not support|cannot decode)")
MAY_BE_EMPTY = ("WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept")  # in DICOM files, as if not there

ValueRange = Sequence[float] | None  # the values that become 0 and 1


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
            return _with_channels(_read_dicom(path, value_range), channels)
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
    _require_finite(path, values)
    return _unit(values, *value_range)


def _require_finite(path: str | Path, values: NDArray[Any]) -> None:
    if count := values.size - np.count_nonzero(np.isfinite(values)):
        raise ValueError(
            f"{path}: expected numbers, got {count} of {values.size} values that are infinite or not a number; "
            "replace those"
        )


def _unit(values: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    scaled = (values.astype(np.float32) - low) / max(high - low, 1e-6)
    return scaled.clip(0, 1)


def _with_channels(image: Tensor, channels: int) -> ImageTensor:
    """[1 or 3, H, W] with the wanted number of channels."""
    if image.shape[0] == 3 and channels == 1:
        return ImageTensor(F.rgb_to_grayscale(image))
    return ImageTensor(image.expand(channels, -1, -1))


def _read_dicom(path: str | Path, value_range: ValueRange) -> Tensor:
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
        colours = pixels if pixels.dtype == np.uint8 else _unit(pixels, 0, 2**bits - 1)
        return torch.from_numpy(np.ascontiguousarray(colours[..., :3])).permute(2, 0, 1)
    values = apply_modality_lut(pixels, dataset)
    _require_finite(path, values)
    has_units = bits > 8 or (dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)) != (1, 0)
    bounds = (value_range if has_units else None) or _window(dataset)
    if bounds is None and dataset.get("VOILUTSequence"):
        scaled = _by_table(path, dataset, values)
    else:
        scaled = _unit(values, *(bounds or _extremes(dataset, pixels, values)))
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
        return _unit(looked_up, 0, 2 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1)
    except Exception as error:  # pydicom raises many kinds for damaged tables
        raise ValueError(f"{path}: {UNREADABLE} ({' '.join(str(error).split())})") from error


def _extremes(dataset: Any, pixels: NDArray[Any], values: NDArray[Any]) -> tuple[float, float]:
    """The lowest and highest value, without those of the padding around the image."""
    within = pixels != dataset.get("PixelPaddingValue")
    inner = values[within] if np.any(within) else values
    return float(inner.min()), float(inner.max())


def _window(dataset: Any) -> tuple[float, float] | None:
    """The first window of a DICOM file, as its lowest and highest value (PS3.3 C.11.2.1.2.1)."""
    if "WindowCenter" not in dataset or "WindowWidth" not in dataset:
        return None
    center, width = (float(np.atleast_1d(dataset[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    if width < 1:  # which the standard rules out, and some write for none
        return None
    low = center - 0.5 - (width - 1) / 2
    return low, low + width - 1
