"""DICOM files: windows, tables, palettes, ranges, and what cannot be decoded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from training_cases import LUMINANCE, make_images, write_dicom

from densenet_efficient.cli import main
from densenet_efficient.training.data import FolderData
from densenet_efficient.training.images import read_image

SMALL: dict[str, Any] = {"image_size": 8, "batch_size": 4, "num_workers": 0}
PIXELS = np.arange(48).reshape(6, 8) * 50
HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1000}
SIGMOID = {"VOILUTFunction": "SIGMOID", "WindowCenter": 1000, "WindowWidth": 400}
EXACT = {"VOILUTFunction": "LINEAR_EXACT", "WindowCenter": 40, "WindowWidth": 400}


@pytest.mark.parametrize(
    ("elements", "value_range", "expected"),
    [
        ({}, None, PIXELS / 2350),
        (HOUNSFIELD | {"WindowCenter": 40.5, "WindowWidth": 401}, None, ((PIXELS - 840) / 400).clip(0, 1)),
        (HOUNSFIELD, (-1000, 1000), (PIXELS / 2000).clip(0, 1)),
        ({"PhotometricInterpretation": "MONOCHROME1"}, None, 1 - PIXELS / 2350),
        ({"WindowCenter": "", "WindowWidth": ""}, None, PIXELS / 2350),
        (HOUNSFIELD | {"WindowCenter": 40.5, "WindowWidth": None}, None, PIXELS / 2350),
        ({"RescaleSlope": None, "RescaleIntercept": None}, (0, 1000), (PIXELS / 1000).clip(0, 1)),
        ({"WindowCenter": 40, "WindowWidth": 0}, None, PIXELS / 2350),
        ({"WindowCenter": 40, "WindowWidth": -5}, None, PIXELS / 2350),
        (SIGMOID, None, 1 / (1 + np.exp(-4 * (PIXELS - 1000) / 400))),
        (SIGMOID | {"PhotometricInterpretation": "MONOCHROME1"}, None, 1 / (1 + np.exp(4 * (PIXELS - 1000) / 400))),
        (HOUNSFIELD | SIGMOID, (-1000, 1000), (PIXELS / 2000).clip(0, 1)),
        (SIGMOID | {"WindowCenter": None}, None, PIXELS / 2350),
        (SIGMOID | {"WindowWidth": 0}, None, PIXELS / 2350),
        (HOUNSFIELD | EXACT, None, ((PIXELS - 840) / 400).clip(0, 1)),
        (EXACT | {"WindowCenter": 1000, "WindowWidth": 0.5}, None, ((PIXELS - 999.75) / 0.5).clip(0, 1)),
        ({"VOILUTFunction": "", "WindowCenter": 840.5, "WindowWidth": 1}, None, (PIXELS > 840).astype(float)),
    ],
)
def test_dicom(elements: dict[str, Any], value_range: Any, expected: np.ndarray, tmp_path: Path) -> None:
    image = read_image(write_dicom(tmp_path / "slice", PIXELS, **elements), 3, value_range)
    assert image.shape == (3, 6, 8)
    np.testing.assert_allclose(image[1].numpy(), expected, atol=1e-6)


def test_dicom_in_colour(tmp_path: Path) -> None:
    pixels = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    colours = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": pixels.tobytes()}
    path = write_dicom(tmp_path / "slice", pixels, **colours, **bits)
    np.testing.assert_array_equal(read_image(path, 3).numpy(), pixels.transpose(2, 0, 1))
    grey = read_image(path, 1)
    assert grey.shape == (1, 6, 8) and grey.dtype == torch.uint8
    np.testing.assert_allclose(grey[0].numpy(), pixels @ LUMINANCE, atol=1)


@pytest.mark.parametrize(("depth", "stored"), [(8, "u1"), (8, "<u2"), (16, "<u2")])
def test_dicom_with_a_palette(depth: int, stored: str, tmp_path: Path) -> None:
    """Of entries of 8 bits, which may be stored in 16, or of 16."""
    indices = np.arange(48).reshape(6, 8) % 4
    palette = np.array([[0, 10, 100, 255], [255, 0, 20, 30], [1, 2, 3, 4]]) * (257 if depth == 16 else 1)
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, entries in zip(("Red", "Green", "Blue"), palette, strict=True):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 0, depth]
        elements[f"{colour}PaletteColorLookupTableData"] = entries.astype(stored).tobytes()
    image = read_image(write_dicom(tmp_path / "slice", indices, **elements), 3)
    values = image.numpy() / 255 if image.dtype == torch.uint8 else image.numpy()
    np.testing.assert_allclose(values, palette[:, indices] / (2**depth - 1), atol=1e-6)


def test_dicom_with_a_palette_of_opacity(tmp_path: Path) -> None:
    palette = np.arange(16, dtype=np.uint8).reshape(4, 4) * 15
    elements: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, entries in zip(("Red", "Green", "Blue", "Alpha"), palette, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, 8]
        elements[f"{name}PaletteColorLookupTableData"] = entries.tobytes()
    indices = np.arange(48).reshape(6, 8) % 4
    image = read_image(write_dicom(tmp_path / "slice", indices, **elements), 3)
    np.testing.assert_array_equal(image.numpy(), palette[:3, indices])


def test_dicom_of_several_frames(tmp_path: Path) -> None:
    frames = {"NumberOfFrames": 2, "PixelData": PIXELS.astype("<u2").tobytes() * 2}
    path = write_dicom(tmp_path / "slice", PIXELS, **frames)
    with pytest.raises(ValueError, match=r"slice: expected a DICOM file of one frame, got 2; export the frames"):
        read_image(path, 1)


def test_dicom_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "slice", PIXELS)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"slice: DICOM needs pydicom; pip install pydicom"):
        read_image(path, 1)


# Of transfer syntaxes that pydicom does not decode by itself: the name, what is to be done.
ENCAPSULATED = [
    (uid.JPEGLosslessSV1, "no decoder of .*, is installed; pip install python-gdcm, or 'pylibjpeg\\[all\\]'"),
    (uid.JPEGLSLossless, "no decoder of .*, is installed; pip install python-gdcm, or 'pylibjpeg\\[all\\]'"),
    (uid.JPEGExtended12Bit, "no decoder of .*, is installed; pip install python-gdcm, or 'pylibjpeg\\[all\\]'"),
    (uid.HTJ2KLossless, "no decoder of .*, is installed; pip install 'pylibjpeg\\[all\\]'"),
    (uid.MPEG2MPML, "its transfer syntax, .*, is none that pydicom decodes; convert the file to an uncompressed one"),
    (uid.JPEG2000Lossless, r"expected an undamaged image .* \(Unable to decode .*\)"),
    (uid.RLELossless, r"expected an undamaged image .* \(Unable to decode .*\)"),
]


@pytest.fixture
def without_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what pydicom brings, and Pillow, wherever further ones are installed."""
    for syntax, _ in ENCAPSULATED[:-3]:
        decoder = get_decoder(syntax)
        for plugin in set(decoder.available_plugins) - {"pydicom", "pillow"}:
            monkeypatch.setitem(decoder._unavailable, plugin, ("another package",))
            monkeypatch.delitem(decoder._available, plugin)


def write_encapsulated(path: Path, syntax: uid.UID) -> Path:
    """A DICOM file of a transfer syntax, whose compressed image is none."""
    dataset = dcmread(write_dicom(path, PIXELS))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    dataset.save_as(path)
    return path


@pytest.mark.parametrize(("syntax", "message"), ENCAPSULATED, ids=[syntax.keyword for syntax, _ in ENCAPSULATED])
def test_dicom_of_a_transfer_syntax_without_a_decoder(
    syntax: uid.UID, message: str, without_decoders: None, tmp_path: Path
) -> None:
    path = write_encapsulated(tmp_path / "slice", syntax)
    with pytest.raises(ValueError, match=f"^{path}: {message}$") as error:
        read_image(path, 1)
    assert "\n" not in str(error.value)
    assert message.startswith("expected") or f"{syntax.name} ({syntax})" in str(error.value)


def test_check_data_names_files_without_a_decoder(
    without_decoders: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_encapsulated(make_images(tmp_path) / "dark" / "slice.dcm", uid.JPEGLosslessSV1)
    assert main(["check-data", "--data", str(tmp_path)]) == 1
    unreadable = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Unreadable")]
    assert len(unreadable) == 1 and unreadable[0].startswith(f"Unreadable: {path}: no decoder of its transfer syntax")
    with pytest.raises(ValueError, match=f"1 of 13 files .*{path}: no decoder .* pip install python-gdcm"):
        FolderData(tmp_path, **SMALL).setup("fit")


def test_a_dicom_file_without_a_transfer_syntax(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "slice", PIXELS)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(uid.ExplicitVRLittleEndian.encode(), b" " * len(uid.ExplicitVRLittleEndian), 1))
    with pytest.raises(ValueError, match=r"slice: expected an undamaged image such as PNG, JPEG, TIFF or DICOM \("):
        read_image(path, 1)


def test_a_dicom_file_needs_no_name_of_its_kind(tmp_path: Path) -> None:
    for name in ("normal", "opaque"):
        (tmp_path / name).mkdir()
        for index in range(5):
            write_dicom(tmp_path / name / f"1.2.840.{index}", PIXELS)
    data = FolderData(tmp_path, **SMALL)
    data.setup("fit")
    assert sum(map(len, data.splits.parts().values())) == 10


def test_a_value_range_is_not_for_dicom_of_eight_bits(tmp_path: Path) -> None:
    """As for PNG of eight bits; but for those that are in units of their own."""
    pixels = np.arange(48, dtype=np.uint8).reshape(6, 8)
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelData": pixels.tobytes()}
    plain = read_image(write_dicom(tmp_path / "plain", pixels, **bits), 1, (-1000, 400))
    np.testing.assert_allclose(plain[0].numpy(), pixels / 47, atol=1e-6)
    units = {"RescaleSlope": 8, "RescaleIntercept": -1000}
    scaled = read_image(write_dicom(tmp_path / "scaled", pixels, **bits, **units), 1, (-1000, 400))
    np.testing.assert_allclose(scaled[0].numpy(), pixels / 175, atol=1e-6)


def test_dicom_by_its_table(tmp_path: Path) -> None:
    """Which is used without a window, and here turns dark into bright."""
    table = Dataset()
    table.LUTDescriptor = [48, 0, 16]
    table.LUTData = np.arange(65535, 65535 - 48 * 100, -100).astype("<u2").tobytes()
    pixels = np.arange(48).reshape(6, 8)
    for name, elements in {
        "table": {},
        "rescaled": {"RescaleSlope": 1, "RescaleIntercept": 0},
        "window": {"WindowCenter": 24, "WindowWidth": 48},
    }.items():
        write_dicom(tmp_path / name, pixels, VOILUTSequence=[table], **elements)
    by_table, rescaled, by_window = (
        read_image(tmp_path / name, 1)[0].flatten() for name in ("table", "rescaled", "window")
    )
    torch.testing.assert_close(by_table, 1 - torch.arange(48) * 100 / 65535)
    assert torch.equal(rescaled, by_table) and (by_window.diff() >= 0).all()
    del table.LUTDescriptor
    with pytest.raises(ValueError, match="expected an undamaged image"):
        read_image(write_dicom(tmp_path / "damaged", pixels, VOILUTSequence=[table]), 1)


def test_padding_of_dicom_is_no_part_of_the_range(tmp_path: Path) -> None:
    pixels = np.array([[0, 0, 1000], [1500, 2000, 0]])
    image = read_image(write_dicom(tmp_path / "slice", pixels, PixelPaddingValue=0), 1)
    np.testing.assert_allclose(image[0].numpy(), [[0, 0, 0], [0.5, 1, 0]])
    empty = read_image(write_dicom(tmp_path / "empty", 0 * pixels, PixelPaddingValue=0), 1)
    assert empty.isfinite().all()
